"""Bad inputs, one row each, of the kinds in which a run goes wrong without a word. `benchmarks.faults` runs them.

    kind, name, command, said, *prepared

``said`` is what the sentence has to hold, ``prepared`` what is done to a copy of a finished run before: functions of its folder,
which holds data/ (one rendered category), work/ (the workspace, everything made) and photos/ (two good pictures). The
command gets the options of `benchmarks.faults` before its own, so that these count.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.fault_pictures import GREY, ODD
from benchmarks.fault_preparations import (
    Prepare,
    array,
    cut,
    folder,
    full_disk,
    hold,
    keep_images,
    known,
    link,
    move,
    nan_in,
    no_large_files,
    no_reader,
    nobody,
    picture,
    remove,
    take,
    write,
)

CATEGORY = "pushpins"


@dataclass(frozen=True)
class Case:
    kind: int
    name: str
    command: str
    said: str
    prepared: tuple[Prepare, ...] = ()
    status: int = 2
    inside: Callable[[], None] | None = None


DATA, WORK = f"data/{CATEGORY}", "work"
TRAIN, VALIDATION, TEST = (f"{DATA}/{part}/good" for part in ("train", "validation", "test"))
SCORES, CKPT = f"{WORK}/anomaly_score/{CATEGORY}", f"{WORK}/ckpt"
TORCH, ONNX, XML = (f"{CKPT}/{folder}_models/{CATEGORY}.{suffix}" for folder, suffix in (
    ("pytorch", "pth"), ("onnx", "onnx"), ("openvino", "xml")))
LGST, MEMORY, SEGMENTOR = f"{CKPT}/best_{CATEGORY}", f"{CKPT}/memory_{CATEGORY}", f"{CKPT}/segmentor_{CATEGORY}_256"
MASKS = f"{WORK}/datasets/masks/{CATEGORY}"
TRAINERS = ("pseudo_label", "train_segmentor", "CSAD", "patch_memory")
LATER = ("export_model", "benchmark_performance", "report")


def case(kind: int, name: str, command: str, said: str, *prepared: Prepare, status: int = 2,
         inside: Callable[[], None] | None = None) -> Case:
    return Case(kind, name, command, said, prepared, status, inside)


def unrecorded(*names: str) -> list[Prepare]:
    """Without the records, as if the files had come from elsewhere: then nothing but their contents can tell."""
    return [remove(f"{name}.json") for name in names]


CASES = [
    # 1: what could not be judged passes as good
    case(1, "a validation score that is NaN", "export_model", "not the file", nan_in(f"{SCORES}_memory_val_score.npy")),
    case(1, "NaN validation score, no record", "export_model", "finite", nan_in(f"{SCORES}_memory_val_score.npy"),
         *unrecorded(MEMORY)),
    case(1, "NaN test score", "benchmark_performance", "finite", nan_in(f"{SCORES}_memory_logi_score.npy")),
    case(1, "NaN test score, no record", "benchmark_performance", "finite", nan_in(f"{SCORES}_memory_logi_score.npy"),
         *unrecorded(MEMORY)),
    case(1, "NaN scores, no record", "report", "finite", nan_in(f"{SCORES}_patchhist_val_score.npy"), *unrecorded(SEGMENTOR)),
    case(1, "NaN maps", "benchmark_performance", "not the file", nan_in(f"{SCORES}_memory_maps.npz")),
    case(1, "NaN maps, no record", "benchmark_performance", "finite", nan_in(f"{SCORES}_memory_maps.npz"), *unrecorded(MEMORY)),
    case(1, "NaN statistics, no record", "export_model", "finite", nan_in(f"{SCORES}_patchhist_params.npz"),
         *unrecorded(SEGMENTOR)),
    case(1, "NaN in a memory", "export_model", "finite", nan_in(f"{MEMORY}.pth"), *unrecorded(MEMORY)),
    case(1, "NaN in a memory, to be scored", "patch_memory", "finite", nan_in(f"{MEMORY}.pth"),
         remove(f"{SCORES}_memory_val_score.npy")),
    case(1, "NaN in a segmentor", "export_model", "finite", nan_in(f"{SEGMENTOR}.pth"), *unrecorded(SEGMENTOR)),
    case(1, "NaN in a segmentor, to be scored", "train_segmentor", "finite", nan_in(f"{SEGMENTOR}.pth"),
         remove(f"{SCORES}_patchhist_val_score.npy")),
    case(1, "NaN in LGST, to be scored", "CSAD", "finite", nan_in(f"{LGST}.pth"), remove(f"{SCORES}_LGST_val_score.npy")),
    case(1, "NaN in the torch model, evaluated", "export_model --inference_only", "finite", nan_in(TORCH)),
    case(1, "NaN in the torch model, to ONNX", "export_model --format onnx", "finite", nan_in(TORCH)),
    case(1, "NaN in the ONNX model, to OpenVINO", "export_model --format openvino", "finite", nan_in(ONNX)),
    case(1, "NaN in the torch model", "predict photos", "undecided", nan_in(TORCH), status=3),
    case(1, "NaN in the ONNX model", f"predict photos --model {ONNX}", "undecided", nan_in(ONNX), status=3),
    *(case(1, f"a threshold of {value}", f"{script} --threshold={value}", "threshold") for value in ("nan", "inf", "-inf", "x")
      for script in ("predict photos", f"serve --model {TORCH}")),
    *(case(1, f"a rate of {value}", f"{script} --false_positive_rate={value}", "false_positive_rate")
      for value in ("nan", "0", "1", "-0.1", "inf")
      for script in ("predict photos", f"serve --model {TORCH}", "check_dataset")),
    *(case(1, f"{setting} is not finite", f"{script} --overwrite --{setting}", setting.split("=")[0]) for script, setting in (
        ("train_segmentor", "segmentor.lr=.nan"), ("CSAD", "lgst.lr=.inf"), ("patch_memory", "memory.score_share=nan"),
        ("pseudo_label", "images.white_level=.inf"))),
    case(1, "a loss that is NaN", "CSAD --overwrite --lgst.lr=1e30", "--lgst.lr"),
    case(1, "a loss that is NaN", "train_segmentor --overwrite --segmentor.lr=1e30", "--segmentor.lr"),

    # 2: left out without a count
    case(2, "an empty folder", "predict photos/none", "no images", folder("photos/none")),
    case(2, "a folder with other files only", "predict photos/none", "no images", write("photos/none/a.pdf")),
    case(2, "one of two is no picture", "predict photos", "1 unreadable", write("photos/b.webp", "none"), status=3),
    case(2, "a linked folder with a bad picture", "predict photos/sub", "unreadable", folder("photos/sub"), folder("more"),
         write("more/b.webp", "none"), link("photos/sub/linked", "../../more"), status=3),
    case(2, "a folder that links to itself", "predict photos/sub", "no images", folder("photos/sub"),
         link("photos/sub/again", "../sub")),
    case(2, "a folder called x.png", "predict photos/sub", "no images", folder("photos/sub/x.png")),
    case(2, "good and bad in one folder", "train_segmentor --overwrite", "good ones", folder(f"{TRAIN}/defect"),
         move(f"{TRAIN}/000.png", f"{TRAIN}/defect/000.png")),
    case(2, "folders of two layouts", "CSAD --overwrite", "two layouts", folder(f"{DATA}/train/ok")),
    *(case(2, "an empty train/good", script, "no images", keep_images(TRAIN, 0)) for script in (*TRAINERS, "check_dataset")),
    case(2, "an empty folder of anomalies", "patch_memory --overwrite", "no images", keep_images(f"{DATA}/test/logical_anomalies",
         0)),
    case(2, "a category that there is not", "benchmark_performance --categories none", "no category"),
    case(2, "a data set that there is not", "report --dataset_root none", "does not exist"),

    # 3: results of other data or another training
    *(case(3, "another test image, as large and as old", script, "not those", take(f"{TEST}/001.png", f"{TEST}/000.png"))
      for script in ("benchmark_performance", "report")),
    *(case(3, "another training image, as large and as old", script, said, take(f"{TRAIN}/001.png", f"{TRAIN}/000.png"))
      for script, said in (("train_segmentor", "something else"), ("CSAD", "something else"), ("patch_memory", "something else"),
                           ("export_model", "not those"), ("pseudo_label", "something else"))),
    case(3, "a test image less", "benchmark_performance", "train_segmentor.py", remove(f"{TEST}/002.png")),
    case(3, "a validation image less", "export_model", "not those", remove(f"{VALIDATION}/002.png")),
    case(3, "checkpoints swapped", "export_model", "not written by", take(f"{LGST}.pth", f"{MEMORY}.pth")),
    case(3, "checkpoints swapped, no record", "export_model", "not written by", take(f"{LGST}.pth", f"{MEMORY}.pth"),
         *unrecorded(MEMORY)),
    case(3, "another branch's scores", "benchmark_performance", "not the file",
         take(f"{SCORES}_LGST_val_score.npy", f"{SCORES}_memory_val_score.npy")),
    *(case(3, "an export of an old training", f"export_model --format {kind}", "before the stages ran",
           write(f"{SCORES}_memory_params.npz"), nan_in(f"{MEMORY}.pth")) for kind in ("onnx", "openvino")),
    case(3, "an ONNX file called .pth", "predict photos", "cannot be read", take(ONNX, TORCH)),
    case(3, "a torch file called .onnx", f"predict photos --model {ONNX}", "cannot", take(TORCH, ONNX)),
    case(3, "a checkpoint instead of a model", f"predict photos --model {LGST}.pth", "model"),
    case(3, "another category's model", "export_model --inference_only --categories cup", "pushpins",
         take(TORCH, f"{CKPT}/pytorch_models/cup.pth"), lambda lab: shutil.copytree(lab / DATA, lab / "data/cup")),
    *(case(3, "other settings", f"{script} {option}", "something else") for script, option in (
        ("pseudo_label", "--pseudo_labels.rotations 3"), ("train_segmentor", "--segmentor.epochs 5"),
        ("CSAD", "--lgst.steps 21"), ("patch_memory", "--memory.rows 51"), ("CSAD", "--seed 1"))),
    *(case(3, "another white level", f"{script} --images.white_level 4095", said) for script, said in (
        ("pseudo_label", "white_level"), ("CSAD", "white_level"), ("export_model", "white_level"))),
    *(case(3, "another backbone", f"{script} --overwrite --backbone mobilenetv3_small_050", "weights") for script in TRAINERS),
    case(3, "another data set's settings", "make_synthetic_loco --seed 1", "--overwrite"),
    case(3, "pseudo-labels of other images", "train_segmentor --overwrite", "pseudo_label.py",
         take(f"{TRAIN}/001.png", f"{TRAIN}/000.png")),
    case(3, "pseudo-labels that stage 1 did not write", "train_segmentor --overwrite", "pseudo_label.py",
         *(take(f"{MASKS}/00{index}/filtered_cluster_map.png", f"{MASKS}/00{index + 1}/filtered_cluster_map.png")
           for index in range(9))),

    # 4: nothing already made is harmed
    *(case(4, f"a truncated {part} image, starting over", f"{script} --overwrite", "cannot be read", cut(f"{folder_}/000.png"))
      for script in TRAINERS for part, folder_ in (("training", TRAIN), ("validation", VALIDATION), ("test", TEST))
      if (script, part) != ("train_segmentor", "training") and (script != "pseudo_label" or part == "training")),
    *(case(4, "a full disk", command, "disk is full", inside=full_disk) for command in (
        *(f"{script} --overwrite" for script in TRAINERS), *LATER, "export_model --format onnx", "export_model --format openvino",
        "make_synthetic_loco --dataset_root more", "check_dataset --output sheets", "predict photos --save_maps")),
    *(case(4, "files may not grow", command, "", inside=no_large_files) for command in (
        "patch_memory --overwrite", "report", "export_model --format openvino")),
    *(case(4, "nothing may be written", command, "permission", inside=nobody) for command in (
        *(f"{script} --overwrite" for script in TRAINERS), *LATER, "make_synthetic_loco --dataset_root more",
        "check_dataset --output sheets", "predict photos", f"serve --model {TORCH} --log more/log.jsonl")),

    # 5: shared outputs without an owner
    *(case(5, "another run in this workspace", script, "another run", inside=hold("work/.csad.lock"))
      for script in (*TRAINERS, *LATER)),
    *(case(5, "another run in a seed's workspace", f"{script} --seeds 3", "another run", inside=hold("work/seeds/3/.csad.lock"))
      for script in (*TRAINERS[1:], *LATER)),
    case(5, "another run writes there", "predict photos --output out", "another predict.py", inside=hold("out/.predict.lock")),
    case(5, "another run watches there", "predict photos --watch --output out", "another predict.py",
         inside=hold("out/.predict.lock")),
    case(5, "another run keeps the log", f"serve --model {TORCH} --log log.jsonl", "another process",
         inside=hold(".log.jsonl.lock")),

    # 6: pictures read otherwise than people see them
    *(case(6, name, "predict photos", said, make(f"photos/odd{suffix}"), status=3) for name, suffix, make, said in ODD),
    # In a data set a link to nothing is left out and named.
    *(case(6, name, f"{script} --overwrite", said, remove(f"{TRAIN}/004.png"), make(f"{TRAIN}/odd{suffix}"))
      for index, (name, suffix, make, said) in enumerate(ODD) if "link" not in name
      for script in (("pseudo_label", "CSAD", "patch_memory")[index % 3],)),
    *(case(6, name, "check_dataset", said, make(f"{TRAIN}/odd{suffix}")) for name, suffix, make, said in ODD
      if "link" not in name),
    case(2, "a link to nothing", "check_dataset", "odd.png: a link", link(f"{TRAIN}/odd.png", "nowhere.png"), status=4),

    # 8: small samples
    *(case(8, f"{count} training images", f"{script} --overwrite", "at least", keep_images(TRAIN, count))
      for count, script in ((1, "pseudo_label"), (2, "train_segmentor"), (3, "CSAD"), (1, "patch_memory"), (2, "check_dataset"))),
    case(8, "4 training images and no other", "pseudo_label --overwrite", "at least", keep_images(TRAIN, 4),
         remove(f"{DATA}/validation")),
    case(8, "more rows than patches", "patch_memory --overwrite --memory.rows 1000000", "--memory.rows"),
    case(8, "an empty validation folder", "patch_memory --overwrite", "no images", keep_images(VALIDATION, 0)),

    # 9: tracebacks and circular advice
    *(case(9, "the device meta", f"{command} --device meta", "meta") for command in (
        *(f"{script} --overwrite" for script in TRAINERS), "export_model", "predict photos", f"serve --model {TORCH}",
        f"predict photos --model {ONNX}")),
    *(case(9, "no test images", script, "no good test images", remove(f"{DATA}/test"))
      for script in ("benchmark_performance", "report")),
    *(case(9, "nobody reads the output", command, "went away", inside=no_reader) for command in (
        "predict photos", "benchmark_performance", "check_dataset", "make_synthetic_loco --dataset_root more",
        f"serve --model {TORCH}", "report", "pseudo_label")),
    *(case(9, "an option that there is not", f"{command} --nonsense 1", "--nonsense") for command in (
        *TRAINERS, *LATER, "predict photos", f"serve --model {TORCH}", "check_dataset", "make_synthetic_loco")),
    *(case(9, f"a damaged {name}", command, "cannot be read", cut(name)) for name, command in (
        (f"{LGST}.pth", "CSAD"), (f"{MEMORY}.json", "patch_memory"), (TORCH, "predict photos"), (TORCH, "report"),
        (f"{SCORES}_metrics.json", "report"), (f"{WORK}/export_report.json", "export_model"),
        (f"{MASKS}/info/filtered_histogram_indices.npy", "train_segmentor"), (f"{WORK}/ckpt/backbone.json",
                                                                             "CSAD --backbone auto"))),
    *(case(9, "JSON that holds something else", command, "does not hold", write(name, content)) for content in ("{}", "[]")
      for name, command in (
        (f"{LGST}.json", "CSAD"), (f"{LGST}.json", "benchmark_performance"), (f"{MEMORY}.json", "export_model"),
        (f"{MEMORY}.json", "report"), (f"{SCORES}_metrics.json", "report"), (f"{CKPT}/backbone.json", "CSAD --backbone auto"),
        (f"{MASKS}/info/pseudo_label.json", "train_segmentor"), (f"{MASKS}.unfinished/begun.json", "pseudo_label"),
        ("data_components/dataset.json", "make_synthetic_loco"))),
    *(case(9, f"scores that are {words}", command, "such images", array(f"{SCORES}_memory_val_score.npy", values),
           *unrecorded(MEMORY)) for command in ("export_model", "benchmark_performance", "report") for words, values in (
               ("none", np.zeros(0)), ("words", np.array(["a"] * 5)), ("a table", np.zeros((5, 2))))),
    case(9, "maps of another shape", "benchmark_performance", "64x64", array(f"{SCORES}_memory_maps.npz", np.zeros((5, 64))),
         *unrecorded(MEMORY)),
    *(case(1, f"{option} is not finite", f"serve --model {TORCH} --{option} inf", option)
      for option in ("max_megabytes", "max_megapixels", "body_seconds", "batch_wait_ms")),
    case(1, "a threshold in the model that is NaN", "predict photos", "finite number", known(TORCH, threshold=np.nan)),
    case(1, "validation scores in the model that are NaN", "predict photos --false_positive_rate 0.3", "finite", known(
        TORCH, validation_scores=[np.nan] * 5)),
    case(9, "pictures larger than any memory", "make_synthetic_loco --image_size 100000000 --dataset_root more", "memory"),
    case(9, "a damaged ONNX model", f"predict photos --model {ONNX}", "cannot", cut(ONNX)),
    case(9, "a damaged OpenVINO model", f"predict photos --model {XML}", "cannot", cut(XML)),
    case(9, "half an OpenVINO model", f"predict photos --model {XML}", "", remove(XML.replace(".xml", ".bin"))),
    case(9, "a folder instead of a model", "predict photos --model work/ckpt", "model"),
    case(9, "a damaged ground truth", "benchmark_performance", "", cut(f"{DATA}/ground_truth/logical_anomalies/000/000.png"),
         status=2),
    case(9, "a damaged defects_config.json", "benchmark_performance", "", write(f"{DATA}/defects_config.json", "[")),
    case(9, "a file in the workspace's place", "CSAD --workspace file", "cannot be used", write("file")),
    case(9, "a file in the output's place", "predict photos --output file", "cannot be used", write("file")),
    case(9, "foreign weights", f"CSAD --backbone_weights {TORCH}", ""),
    case(9, "weights that are none", "CSAD --backbone_weights data/x", "does not hold", write("data/x", "none")),

    # 10: small traps
    case(10, "~ where the shell leaves it alone", "predict photos --model=~/none.pth", "/none.pth is missing"),
    case(10, "~ in a log's name", f"serve --model {TORCH} --log=~/file/log.jsonl", "cannot be used", write("file")),
    case(10, "~ in a data set's name", "make_synthetic_loco --dataset_root=~/file/x", "cannot be used", write("file")),
    *(case(10, f"{value} for {name}", f"{script} --overwrite --{name}={value}", said) for script, name, value, said in (
        ("CSAD", "lgst.steps", "010", "lgst.steps"), ("CSAD", "lgst.steps", "1:30", "lgst.steps"),
        ("CSAD", "lgst.steps", "true", "lgst.steps"), ("CSAD", "lgst.steps", "1e3", "lgst.steps"),
        ("CSAD", "lgst.steps", "0x10", "lgst.steps"), ("CSAD", "lgst.steps", "1_000", "lgst.steps"),
        ("CSAD", "lgst.steps", "0", "lgst.steps"), ("CSAD", "lgst.steps", "'[1'", "YAML"),
        ("pseudo_label", "pseudo_labels.bandwidth", "-1", "bandwidth"), ("pseudo_label", "pseudo_labels.bandwidth", "0", "bandw"),
        ("train_segmentor", "segmentor.batch_size", "1", "batch_size"), ("patch_memory", "images.size", "300", "images.size"),
        ("patch_memory", "memory.rows", "inf", "memory.rows"))),
    *(case(10, "a seed that is none", f"{script} --seed={value}", "seed") for script, value in (
        ("CSAD", "-1"), ("CSAD", "1.5"), ("train_segmentor", "99999999999999999999"), ("make_synthetic_loco", "-1"))),
    case(10, "a preset that there is not", "CSAD --preset fast", "preset"),
    case(10, "a branch that there is not", "export_model --branches LGST none", "none"),
    case(10, "a precision that cannot be", "export_model --precision int8", "int8"),
    case(10, "a format that there is not", "export_model --format tflite", "tflite"),
    case(10, "no batch", "predict photos --batch_size 0", "batch_size"),
    case(10, "a port that there is not", f"serve --model {TORCH} --port 70000", "port"),
    case(10, "two models of one name", f"serve --model {TORCH} {ONNX}", "rename"),
    case(10, "an empty token", f"serve --model {TORCH} --token ''", "token"),
    case(10, "a size that shows nothing", "make_synthetic_loco --image_size 10 --dataset_root more", "image_size"),
    case(10, "fewer pictures than none", "make_synthetic_loco --train=-1 --dataset_root more", "train"),
    case(10, "no workers", "make_synthetic_loco --workers 0 --dataset_root more", "workers"),
    case(10, "sheets among the pictures", f"check_dataset --output {TRAIN}", "another folder"),
    case(10, "a region of interest that is empty", "CSAD --overwrite", "roi", picture(f"{DATA}/roi.png", GREY * 0)),

    # 11: what ran is what is said
    *(case(11, f"the device {device}", f"{command} --device {device}", "device") for device in ("cuda:99", "nonsense")
      for command in (*(f"{script} --overwrite" for script in TRAINERS), "export_model", "predict photos",
                      f"serve --model {TORCH}")),
]
