"""Put what the stages made together into one model (docs/method.md section 4)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from csad import settings
from csad.branches import BRANCHES
from csad.data import files, images, layouts, records
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation.areas import area_statistics
from csad.evaluation.scores import normalisation
from csad.export.versions import versions

import torch

from models.backbone import fingerprint
from models.constants import IMAGENET_MEAN, IMAGENET_STD
from models.fused import attach_metadata, from_state, published_state
from models.fusion import EXPORTED_STD_FLOOR
from models.histogram_evidence import fitted_evidence
from models.patch_histogram import PatchHistogramDetector

# With which the keys of each branch's checkpoint begin in the fused state dict.
STATE_PREFIXES = {"patchhist": "segmentor.", "LGST": "", "memory": "memory.", "DFM": "dfm."}


def sources(category: str, workspace: Workspace, branches: list[str]) -> dict[str, str]:
    """Digests of the files that a fused model is made of, by name; UserError if one is missing, with the
    stage that makes it."""
    paths = [(branch, workspace.checkpoint(category, branch)) for branch in branches]
    paths += [(branch, path) for branch in branches for path in workspace.good_scores(category, branch)]
    if "patchhist" in branches:
        paths.append(("patchhist", workspace.patch_histogram_parameters(category)))
        if workspace.evidence_parameters(category).exists():
            paths.append(("patchhist", workspace.evidence_parameters(category)))
    return {path.name: records.digest(files.require(path, BRANCHES[branch].stage)) for branch, path in paths}


def require_up_to_date(
    metadata: dict[str, Any], category: str, workspace: Workspace, source: Path, format_: str
) -> None:
    """Refuse (UserError) to export an old training: the stages' files have to be those that the source was
    made of, where they are there."""
    if "made_of" not in metadata:  # a published file
        return
    try:
        now = sources(category, workspace, metadata.get("weighed", metadata["branches"]))
    except UserError:
        return  # only the exported model was brought here
    if now != metadata["made_of"]:
        raise UserError(
            f"{source} was made before the stages ran again; run export_model.py --format torch"
            f"{' and --format onnx' if format_ == 'onnx' else ''} first"
        )


def fused_state(
    category: layouts.Category,
    workspace: Workspace,
    fusion: settings.FusionSettings,
    view: images.View,
    weights: Mapping[str, float],
    precision: str = "fp32",
    weighed: list[str] | None = None,
    names: Mapping[int, str] | None = None,
) -> dict:
    """Read every artefact of a category and return the fused model's state dict, metadata attached.

    Args:
        fusion: which branches to fuse, and how.
        view: how the category's pictures are seen, by the stages, too.
        weights: of the branches in the sum, by their names; the others are left out.
        precision: in which the model is to run; the weights stay in fp32.
        weighed: the branches among which the weights were decided, those left out included; None: those with weights.
        names: what people call components, of those that have a name.

    Raises:
        UserError: an artefact is missing (named, with the stage that makes it), holds numbers that are not finite, or two do not
            belong together; or a component is named that there is not.
    """
    weighed = list(weights) if weighed is None else weighed
    name, made_of = category.name, sources(category.name, workspace, weighed)
    saved = _read_checkpoints(category, workspace, list(weights))
    meta = next(iter(saved.values()))["meta"]
    if meta["images"] != view.record:
        changes = "; ".join(records.difference(meta["images"], view.record))
        raise UserError(
            f"{name}: the stages saw the images otherwise ({changes}); export with the same settings and region of "
            "interest, or run the stages again"
        )
    state = OrderedDict(_with_prefix("encoder.", _encoder_state(name, workspace, saved), left_out="network."))
    for branch, content in saved.items():
        state |= _with_prefix(STATE_PREFIXES[branch], content["state"])
        mean, std = normalisation(category, workspace, branch, fusion.rule, EXPORTED_STD_FLOOR)
        state[f"{BRANCHES[branch].statistics}_mean"] = torch.tensor(mean)
        state[f"{BRANCHES[branch].statistics}_std"] = torch.tensor(std)
    if view.roi is not None:
        state["roi"] = torch.from_numpy(view.roi)
    branches = [branch for branch in BRANCHES if branch in saved]
    metadata = {
        "category": name,
        "dataset": category.root.resolve().parent.name,
        "branches": branches,
        "fusion_rule": fusion.rule,
        "branch_weights": {branch: weights[branch] for branch in branches},
        "weighed": weighed,
        "input_size": view.size,
        "tiles": view.tiles,
        "white_level": view.white_level,
        "training_pictures": images.usual_picture(category.train, view.white_level),
        "raw_input": False,
        "with_map": True,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "precision": precision,
        "backbone": meta["backbone"],
        "backbone_fingerprint": meta["backbone_fingerprint"],
        "stand_ins": sorted({each for content in saved.values() for each in content["meta"]["stand_ins"]}),
        "chosen_on_test": [branch for branch, content in saved.items() if "selection" in content["meta"]],
        "training": {branch: content["meta"] for branch, content in saved.items()},
        "made_of": made_of,
        "weights": "",  # their fingerprint, once the model is built
        "versions": versions(),
    }
    if "patchhist" in saved:
        buffers, histogram = _patch_histogram(name, workspace, saved["patchhist"], names or {})
        state |= buffers
        metadata |= histogram
    if "memory" in saved:
        its = saved["memory"]["meta"]["memory"]
        metadata |= {"memory_score_share": its["score_share"], "memory_border": its["border"]}
    attach_metadata(state, metadata)
    try:
        model = from_state(state)
    except UserError as problem:
        raise UserError(
            f"{name}: the stages' checkpoints do not fit together ({' '.join(str(problem.__cause__).split())[:200]}); "
            "make them again with --overwrite"
        ) from problem
    state = published_state(model)
    require_finite(state, name)
    attach_metadata(state, metadata | {"weights": fingerprint(model)})
    return state


def _read_checkpoints(
    category: layouts.Category, workspace: Workspace, branches: list[str]
) -> dict[str, dict[str, Any]]:
    """The branches' checkpoints; errors as of `fused_state`."""
    name = category.name
    saved: dict[str, dict[str, Any]] = {}
    digests = {
        "train_images": records.digest_images(category.train),
        "validation": records.digest_images(category.validation),
    }
    for branch in branches:
        row, path = BRANCHES[branch], workspace.checkpoint(name, branch)
        saved[branch] = content = files.read_state(path)
        # A file of another stage has other keys, and other settings in its provenance.
        is_own = files.holds(content, {"state": dict, "meta": dict})
        if not (is_own and row.state_key in content["state"] and row.section in content["meta"]):
            raise UserError(
                f"{path} was not written by the stage that it is named after; make it again with --overwrite"
            )
        inputs = [path, *workspace.good_scores(name, branch)]
        records.require_current(workspace.record(name, branch), digests, inputs, row.stage)
        first, meta = saved[branches[0]]["meta"], content["meta"]
        backbones = f"backbones ({first['backbone']}, {meta['backbone']})"
        for key, title in (
            ("backbone_fingerprint", backbones),
            ("train_images", "training images"),
            ("images", "views of the images"),
        ):
            if first[key] != meta[key]:
                raise UserError(
                    f"{name}: {BRANCHES[branches[0]].stage} and {row.stage} were run on different {title}; "
                    "run both with the same options and data"
                )
    return saved


def _with_prefix(prefix: str, state: Mapping[str, Any], left_out: str = "") -> dict[str, Any]:
    return {f"{prefix}{key.removeprefix(left_out)}": values for key, values in state.items()}


def _patch_histogram(
    category: str, workspace: Workspace, saved: dict[str, Any], names: Mapping[int, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The part of the fused state that stage 2 fitted after training the segmentor, and what metadata say of it."""
    classes = len(saved["state"][BRANCHES["patchhist"].state_key])
    by_evidence = saved["meta"]["segmentor"]["evidence"]
    fitted, detector = workspace.patch_histogram_parameters(category), PatchHistogramDetector(classes)
    parameters = files.read_arrays(fitted)
    buffers: dict[str, Any] = {}
    try:
        detector.load_parameters(parameters, trimmed=not by_evidence)
        if by_evidence:
            evidence = fitted_evidence(files.read_arrays(workspace.evidence_parameters(category)), classes)
            buffers = _with_prefix("evidence.", evidence.state_dict())
    except ValueError as problem:
        raise UserError(
            f"{fitted} does not fit {workspace.checkpoint(category, 'patchhist')}: {problem}; "
            "run train_segmentor.py --overwrite"
        ) from problem
    if unknown := [component for component in names if component >= classes]:
        raise UserError(
            f"configs/categories/{category}.yaml names component {unknown[0]}, but {category} has components "
            f"1 to {classes - 1}"
        )
    return buffers | _with_prefix("patch_hist_detector.", detector.state_dict()), {
        "classes": classes,
        "histogram": area_statistics(parameters, classes),
        "names": {str(component): title for component, title in names.items()},
    }


def require_finite(state: dict[str, torch.Tensor], name: str) -> None:
    """Refuse (UserError) a model with numbers that are not finite: it could call every image normal."""
    for key, values in state.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise UserError(
                f"{name}: {key} holds numbers that are not finite, so the model is not exported; train its stage "
                "again with --overwrite"
            )


def _encoder_state(category: str, workspace: Workspace, saved: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The encoder's weights, from a branch's checkpoint or, as the patch histogram's has none, from one beside it."""
    wanted = next(iter(saved.values()))["meta"]["backbone_fingerprint"]
    for branch in dict.fromkeys((*saved, *BRANCHES)):
        path = workspace.checkpoint(category, branch)
        content: Any = saved.get(branch) or (files.read_state(path) if path.exists() else None)
        if files.holds(content, {"encoder": dict, "meta": dict}):
            if content["meta"].get("backbone_fingerprint") == wanted:
                return content["encoder"]
    raise UserError(
        f"{category}: no checkpoint holds the encoder's weights, as train_segmentor.py leaves them to the other "
        "stages; run patch_memory.py with the same --backbone first"
    )
