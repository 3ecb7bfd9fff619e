"""Put what the stages made together into one model (docs/method.md section 4)."""

from __future__ import annotations

import itertools
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

from models.backbone import empty_encoder, fingerprint
from models.constants import IMAGENET_MEAN, IMAGENET_STD
from models.dfm import model_from_state
from models.fused import (
    FusedModel,
    attach_metadata,
    empty_lgst,
    empty_patch_histogram,
    from_state,
    memory_shape,
    published_state,
)
from models.fusion import EXPORTED_STD_FLOOR
from models.histogram_evidence import HistogramEvidence
from models.patch_memory import PatchMemory


def sources(category: str, workspace: Workspace, branches: list[str]) -> dict[str, str]:
    """Digests of the files that a fused model is made of, by name.

    Raises:
        UserError: one is missing; names the stage that makes it.
    """
    paths = [(workspace.checkpoint(category, branch), BRANCHES[branch].stage) for branch in branches]
    paths += [
        (path, BRANCHES[branch].stage)
        for branch in branches
        for path in workspace.good_scores(category, branch)
    ]
    if "patchhist" in branches:
        paths.append((workspace.patch_histogram_parameters(category), BRANCHES["patchhist"].stage))
        if workspace.evidence_parameters(category).exists():
            paths.append((workspace.evidence_parameters(category), BRANCHES["patchhist"].stage))
    return {path.name: records.digest(files.require(path, stage)) for path, stage in paths}


def require_up_to_date(
    known: dict[str, Any], category: str, workspace: Workspace, source: Path, format_: str
) -> None:
    """Refuse to export an old training: the stages' files have to be those that the source was made of, where they are there.

    Raises:
        UserError: they have changed since.
    """
    if "made_of" not in known:  # a published file
        return
    try:
        now = sources(category, workspace, known.get("weighed", known["branches"]))
    except UserError:
        return  # only the exported model was brought here
    if now != known["made_of"]:
        raise UserError(
            f"{source} was made before the stages ran again; run export_model.py --format torch"
            f"{' and --format onnx' if format_ == 'onnx' else ''} first"
        )


def fused_state(
    category: layouts.Category,
    workspace: Workspace,
    chosen: settings.FusionSettings,
    view: images.View,
    precision: str = "fp32",
    weights: Mapping[str, float] | None = None,
    weighed: list[str] | None = None,
    names: Mapping[int, str] | None = None,
) -> dict:
    """Read every artefact of a category and return the fused model's state dict, metadata attached.

    Args:
        chosen: which branches to fuse, and how.
        view: how the category's pictures are seen, by the stages, too.
        precision: in which the model is to run; the weights stay in fp32.
        weights: of the branches in the sum, by their names; the others are left out. None: 1 for each of the settings' branches.
        weighed: the branches among which the weights were decided, those left out included; None: those with weights.
        names: what people call components, of those that have a name.

    Raises:
        UserError: an artefact is missing (named, with the stage that makes it), holds numbers that are not finite, or two do not
            belong together; or a component is named that there is not.
    """
    branches = list(chosen.branches if weights is None else weights)
    weighed = branches if weighed is None else weighed
    name, made_of = category.name, sources(category.name, workspace, weighed)
    saved, digests = (
        {},
        {
            "train_images": records.digest_images(category.train),
            "validation": records.digest_images(category.validation),
        },
    )
    for branch in branches:
        path = workspace.checkpoint(name, branch)
        saved[branch] = files.read_state(path)
        # A file of another stage has other keys, and other settings in its provenance.
        if not (
            files.holds(saved[branch], {"state": dict, "meta": dict})
            and BRANCHES[branch].state_key in saved[branch]["state"]
            and BRANCHES[branch].section in saved[branch]["meta"]
        ):
            raise UserError(
                f"{path} was not written by the stage that it is named after; make it again with --overwrite"
            )
        records.require_current(
            workspace.record(name, branch),
            digests,
            [path, *workspace.good_scores(name, branch)],
            BRANCHES[branch].stage,
        )
    _require_same(name, saved)
    meta = saved[branches[0]]["meta"]
    encoder = empty_encoder(meta["backbone"])
    segmentor = detector = lgst = memory = dfm = parameters = evidence = None
    if "patchhist" in branches:
        segmentor, detector = empty_patch_histogram(encoder, saved["patchhist"]["state"])
        fitted = workspace.patch_histogram_parameters(name)
        parameters = files.read_arrays(fitted)
        try:
            by_evidence = saved["patchhist"]["meta"]["segmentor"]["evidence"]
            detector.load_parameters(parameters, trimmed=not by_evidence)
            if by_evidence:
                evidence = HistogramEvidence(detector.classes)
                evidence.load_parameters(files.read_arrays(workspace.evidence_parameters(name)))
        except ValueError as problem:
            raise UserError(
                f"{fitted} does not fit {workspace.checkpoint(name, 'patchhist')}: {problem}; "
                "run train_segmentor.py --overwrite"
            ) from problem
        if unknown := [component for component in names or {} if component >= detector.classes]:
            raise UserError(
                f"configs/categories/{name}.yaml names component {unknown[0]}, but {name} has components "
                f"1 to {detector.classes - 1}"
            )
    if "LGST" in branches:
        lgst = empty_lgst(encoder, saved["LGST"]["state"])
    if "memory" in branches:
        its = saved["memory"]["meta"]["memory"]
        memory = PatchMemory(
            *memory_shape(saved["memory"]["state"]), its["score_share"], view.tiles, its["border"]
        )
    if "DFM" in branches:
        dfm = model_from_state(saved["DFM"]["state"], encoder.channels[2])
    if meta["images"] != view.record:
        changes = "; ".join(records.difference(meta["images"], view.record))
        raise UserError(
            f"{name}: the stages saw the images otherwise ({changes}); export with the same settings and region of "
            "interest, or run the stages again"
        )
    roi = None if view.roi is None else torch.from_numpy(view.roi)
    model = FusedModel(
        encoder,
        segmentor,
        detector,
        lgst,
        memory,
        view.size,
        roi,
        evidence,
        chosen.rule,
        view.tiles,
        dfm,
        weights,
    )
    try:
        encoder.load_state_dict(_encoder_state(name, workspace, saved))
        for branch, module in (("patchhist", segmentor), ("LGST", lgst), ("memory", memory)):
            if module is not None:
                module.load_state_dict(saved[branch]["state"])
    except RuntimeError as problem:
        raise UserError(
            f"{name}: the stages' checkpoints do not fit together ({' '.join(str(problem).split())[:200]}); "
            "make them again with --overwrite"
        ) from problem
    for branch in branches:
        mean, std = normalisation(category, workspace, branch, chosen.rule, EXPORTED_STD_FLOOR)
        getattr(model, f"{BRANCHES[branch].statistics}_mean").fill_(mean)
        getattr(model, f"{BRANCHES[branch].statistics}_std").fill_(std)
    state = published_state(model)
    require_finite(state, name)
    attach_metadata(
        state,
        {
            "category": name,
            "dataset": category.root.resolve().parent.name,
            "branches": model.branches,
            "fusion_rule": chosen.rule,
            "branch_weights": model.weights,
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
            "stand_ins": sorted(
                {stand_in for one in saved.values() for stand_in in one["meta"]["stand_ins"]}
            ),
            "chosen_on_test": [branch for branch, one in saved.items() if "selection" in one["meta"]],
            "training": {branch: one["meta"] for branch, one in saved.items()},
            "made_of": made_of,
            "weights": fingerprint(model),
            "versions": versions(),
        }
        | (
            {}
            if detector is None or parameters is None
            else {
                "classes": detector.classes,
                "histogram": area_statistics(parameters, detector.classes),
                "names": {str(component): title for component, title in (names or {}).items()},
            }
        )
        | (
            {"memory_score_share": memory.score_share, "memory_border": memory.border}
            if memory is not None
            else {}
        ),
    )
    from_state(state)  # refuses parts that do not fit together before anything is written
    return state


def require_finite(state: dict[str, torch.Tensor], name: str) -> None:
    """Refuse a model with numbers that are not finite: it could call every image normal.

    Raises:
        UserError: names the first tensor that has one.
    """
    for key, values in state.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise UserError(
                f"{name}: {key} holds numbers that are not finite, so the model is not exported; train its stage "
                "again with --overwrite"
            )


def _encoder_state(category: str, workspace: Workspace, saved: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The encoder's weights, from a branch's checkpoint or, as the patch histogram's has none, from one beside it.

    Args:
        saved: checkpoints by branch.

    Raises:
        UserError: no checkpoint holds those of the same backbone.
    """
    wanted = next(iter(saved.values()))["meta"]["backbone_fingerprint"]
    beside = (workspace.checkpoint(category, branch) for branch in BRANCHES if branch not in saved)
    for content in itertools.chain(
        saved.values(), (files.read_state(path) for path in beside if path.exists())
    ):
        if files.holds(content, {"encoder": dict, "meta": dict}):
            if content["meta"].get("backbone_fingerprint") == wanted:
                return content["encoder"]
    raise UserError(
        f"{category}: no checkpoint holds the encoder's weights, as train_segmentor.py leaves them to the other "
        "stages; run patch_memory.py with the same --backbone first"
    )


def _require_same(name: str, saved: dict[str, dict]) -> None:
    (first, one), *others = saved.items()
    for branch, other in others:
        for what, words in (
            ("backbone_fingerprint", "backbones"),
            ("train_images", "training images"),
            ("images", "views of the images"),
        ):
            if one["meta"][what] != other["meta"][what]:
                told = (
                    f" ({one['meta']['backbone']}, {other['meta']['backbone']})"
                    if words == "backbones"
                    else ""
                )
                raise UserError(
                    f"{name}: {BRANCHES[first].stage} and {BRANCHES[branch].stage} were run on different {words}"
                    f"{told}; run both with the same options and data"
                )
