"""Put what the stages made together into one model (METHOD.md section 4)."""

from __future__ import annotations

import platform
from collections import OrderedDict
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from data import files
from data.images import IMAGENET_MEAN, IMAGENET_STD
from data.workspace import Workspace
from errors import UserError
from models.backbone import fingerprint
from models.fused import METADATA_KEY, attach_metadata, from_state
from models.fusion import EXPORTED_STD_FLOOR, apply_trimmed_z, fit_trimmed_z
from models.patch_histogram import PatchHistogramDetector, area_statistics

INPUT_SIZE = 256
FALSE_POSITIVES = 0.01  # share of good images over the suggested threshold
_PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "openvino", "nncf")


def fused_state(category: str, workspace: Workspace, dataset: str, precision: str = "fp32") -> dict:
    """Read every artefact of a category and return the fused model's state dict, metadata attached.

    Args:
        dataset: name of the data set that the stages worked on, for the metadata.
        precision: in which the model is to run; the weights stay in fp32.

    Raises:
        UserError: an artefact is missing (named, with the stage that makes it), or two do not belong together.
    """
    segmentor = files.read_state(files.require(workspace.segmentor(category), "train_segmentor.py"))
    lgst = files.read_state(files.require(workspace.lgst(category), "CSAD.py"))
    fitted = files.require(workspace.patch_histogram_parameters(category), "train_segmentor.py")
    parameters = files.read_arrays(fitted)
    lgst_scores = files.read_array(files.require(workspace.scores(category, "LGST", "val"), "CSAD.py"))
    histogram_scores = files.read_array(files.require(workspace.scores(category, "patchhist", "val"), "train_segmentor.py"))
    for path, content, key in ((workspace.segmentor(category), segmentor, "fc2.conv3.weight"),
                               (workspace.lgst(category), lgst, "local_st.conv_st.weight")):
        if not (isinstance(content, dict) and {"state", "meta"} <= content.keys() and key in content["state"]):
            raise UserError(f"{path} was not written by the stage that it is named after; make it again with --overwrite")
    backbone, trained_on = lgst["meta"]["backbone"], lgst["meta"]["backbone_fingerprint"]
    if trained_on != segmentor["meta"]["backbone_fingerprint"]:
        raise UserError(f"{category}: segmentor and LGST were trained on different backbones "
                        f"({segmentor['meta']['backbone']}, {backbone}); run train_segmentor.py and CSAD.py with the "
                        "same --backbone and --backbone_weights")

    classes = segmentor["state"]["fc2.conv3.weight"].shape[0]
    detector = PatchHistogramDetector(classes)
    try:
        detector.load_parameters(parameters)
    except ValueError as problem:
        raise UserError(f"{fitted} does not fit {workspace.segmentor(category)}: {problem}; "
                        "run train_segmentor.py --overwrite") from problem

    parts = {f"encoder.{key}": value for key, value in lgst["encoder"].items()} | lgst["state"]
    parts |= {f"segmentor.{key}": value for key, value in segmentor["state"].items()}
    parts |= {f"patch_hist_detector.{key}": value for key, value in detector.state_dict().items()}
    fused_scores = 0.0
    for branch, scores in (("lgst", lgst_scores), ("patch_hist", histogram_scores)):
        mean, std = fit_trimmed_z(scores, EXPORTED_STD_FLOOR)
        parts |= {f"{branch}_mean": torch.tensor(mean).float(), f"{branch}_std": torch.tensor(std).float()}
        fused_scores = fused_scores + apply_trimmed_z(scores, mean, std)

    state = OrderedDict(parts)
    state._metadata = OrderedDict()
    attach_metadata(state, {
        "category": category, "dataset": dataset, "classes": classes, "input_size": INPUT_SIZE,
        "raw_input": False, "with_map": True, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD),
        "precision": precision, "backbone": backbone, "backbone_fingerprint": trained_on,
        "stand_ins": sorted({*segmentor["meta"]["stand_ins"], *lgst["meta"]["stand_ins"]}),
        "training": {"segmentor": segmentor["meta"], "lgst": lgst["meta"]},
        "validation_scores": sorted(fused_scores.tolist()),
        "threshold": float(np.quantile(fused_scores, 1 - FALSE_POSITIVES)),
        "histogram": area_statistics(parameters, classes), "versions": versions()})
    model = from_state(state)  # refuses parts that do not fit together before anything is written
    state._metadata[METADATA_KEY]["weights"] = fingerprint(model)
    return state


def versions() -> dict[str, str]:
    """Of Python and of the packages that make or run exported models, those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
