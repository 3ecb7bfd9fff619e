"""What stages wrote and others read: numbers that are none, results of others, other versions, damage."""

import numpy as np

from benchmarks.faults import OVERWRITABLE
from faults import preparations as do
from faults import processes
from faults import row as at
from faults.preparations import cut, nan, remove, take, write
from faults.row import LATER, LGST, MEMORY, ONNX, OVERWRITING, PREDICT, SCORES, SEGMENTOR, TORCH, XML, rows

NO_NUMBERS = [np.zeros(0), np.array(["a"] * 5), np.zeros((5, 2))]
# fmt: off
GROUPS = [
    # What cannot be judged is not normal.
    [*rows("a NaN validation score", "export_model", "not the file", nan(f"{SCORES}_memory_val_score.npy")),
     *rows("a NaN test score", "benchmark_performance", "finite", nan(f"{SCORES}_memory_logi_score.npy")),
     *rows("NaN maps", "benchmark_performance", "not the file", nan(f"{SCORES}_memory_maps.npz"))],
    [row for name, command, record in (
        ("memory_val_score.npy", "export_model", MEMORY), ("patchhist_params.npz", "export_model", SEGMENTOR),
        ("patchhist_val_score.npy", "report", SEGMENTOR),
        ("memory_logi_score.npy", "benchmark_performance", MEMORY),
        ("memory_maps.npz", "benchmark_performance", MEMORY))
     for row in rows(f"NaN in {name}, no record", command, "finite", nan(f"{SCORES}_{name}"),
                     *at.without_records(record))],
    [row for name in (MEMORY, SEGMENTOR)
     for row in rows("NaN in a checkpoint, no record", "export_model", "finite", nan(f"{name}.pth"),
                     *at.without_records(name))],
    [row for script, name, branch in (
        ("CSAD", LGST, "LGST"), ("patch_memory", MEMORY, "memory"),
        ("train_segmentor", SEGMENTOR, "patchhist"))
     for row in rows("NaN in a checkpoint, to be scored", script, "finite", nan(f"{name}.pth"),
                     remove(f"{SCORES}_{branch}_val_score.npy"))],
    [*rows("NaN in the model", ["export_model --inference_only", "export_model --format onnx"], "finite",
           nan(TORCH)),
     *rows("NaN in the ONNX model", "export_model --format openvino", "finite", nan(ONNX))],
    [row for model in (TORCH, ONNX)
     for row in rows("NaN in the model", f"{PREDICT} --model {model}", "undecided", nan(model), status=3)],
    [*rows("a NaN threshold in the model", PREDICT, "finite number", do.metadata(TORCH, threshold=np.nan)),
     *rows("NaN validation scores in the model", f"{PREDICT} --false_positive_rate 0.3", "finite",
           do.metadata(TORCH, validation_scores=[np.nan] * 5))],
    [row for values in NO_NUMBERS
     for row in rows(f"scores {values.dtype} {values.shape}", LATER, "such images",
                     do.array(f"{SCORES}_memory_val_score.npy", values), *at.without_records(MEMORY))],
    rows("maps of another shape", "benchmark_performance", "64x64", *at.without_records(MEMORY),
         do.array(f"{SCORES}_memory_maps.npz", np.zeros((5, 64)))),

    # Results of other data, another training, or another stage.
    rows("another test image", LATER[1:], "not those", take(f"{at.TEST}/000.png", "001.png")),
    [row for commands, said in (
        (OVERWRITABLE, "different settings or images"), ("export_model", "not those"), (OVERWRITING[1], "pseudo_label.py"))
     for row in rows("another training image", commands, said, take(f"{at.TRAIN}/000.png", "001.png"))],
    [*rows("a test image less", "benchmark_performance", "train_segmentor.py", remove(f"{at.TEST}/002.png")),
     *rows("a validation image less", "export_model", "not those", remove(f"{at.VALIDATION}/002.png"))],
    [row for records in ([], [MEMORY])
     for row in rows("checkpoints swapped", "export_model", "not written by", *at.without_records(*records),
                     take(f"{MEMORY}.pth", "best_pushpins.pth"))],
    rows("another branch's scores", "benchmark_performance", "not the file",
         take(f"{SCORES}_memory_val_score.npy", "pushpins_LGST_val_score.npy")),
    rows("an export of an old training", ["export_model --format onnx", "export_model --format openvino"],
         "before the stages ran", write(f"{SCORES}_memory_params.npz"), nan(f"{MEMORY}.pth")),
    [*rows("an ONNX file called .pth", PREDICT, "cannot be read",
           take(TORCH, "../onnx_models/pushpins.onnx")),
     *rows("a torch file called .onnx", f"{PREDICT} --model {ONNX}", "cannot",
           take(ONNX, "../pytorch_models/pushpins.pth")),
     *rows("a checkpoint instead of a model", f"{PREDICT} --model {LGST}.pth", "model")],
    rows("another category's model", "export_model --inference_only --categories cup", "pushpins",
         take(f"{at.CKPT}/pytorch_models/cup.pth", "pushpins.pth"), do.copy_tree("data/cup", "pushpins")),
    rows("other settings", ["CSAD --lgst.steps 21", "CSAD --seed 1", "train_segmentor --segmentor.epochs 5",
                            "pseudo_label --pseudo_labels.rotations 3", "patch_memory --memory.rows 51"],
         "different settings or images"),
    rows("another white level", [f"{script} --images.white_level 4095"
                                 for script in ("CSAD", "pseudo_label", "export_model")], "white_level"),
    rows("another backbone", [f"{command} --backbone mobilenetv3_small_050" for command in OVERWRITING],
         "weights"),
    rows("another data set's settings", "make_synthetic_loco --seed 1", "--overwrite"),
    [*rows("an export that gives other scores", ["export_model --with_map --format onnx",
                                                 "export_model --with_map --format openvino"],
           "so it is not kept", inside=processes.damaged_export),
     *(row for damage in (cut(f"{LGST}.pth"), take(f"{LGST}.pth", "memory_pushpins.pth"))
       for row in rows("an optional branch that does not fit", "export_model", "LGST is left out", damage,
                       status=0, rewrites=[f"{at.CKPT}/pytorch_", "work/export_report", f"{SCORES}_"]))],

    # Another version of the code.
    [row for name, command in ((LGST, "CSAD"), (LGST, "report"), (MEMORY, "export_model"),
                               (SEGMENTOR, "benchmark_performance"),
                               (f"{at.MASKS}/info/pseudo_label", "pseudo_label"),
                               (f"{at.MASKS}/info/pseudo_label", "train_segmentor --overwrite"))
     for row in rows("another version's record", command, "another version of this code",
                     do.version_0(f"{name}.json"))],
    [row for name, command in ((LGST, "CSAD"), (SEGMENTOR, "train_segmentor"), (MEMORY, "patch_memory"))
     for row in rows("another version's checkpoint, no record", command, "format_version: 0 -> ",
                     *at.without_records(name), do.old_checkpoint(f"{name}.pth"))],
    [row for model, old in ((TORCH, do.metadata(TORCH, format_version=0)), (ONNX, do.version_0(ONNX)),
                            (XML, do.version_0(XML)))
     for row in rows("another version's model", [f"{PREDICT} --model {model}", f"serve --model {model}"],
                     "another version of this code", old)],
    [*rows("another version's model", ["export_model --format onnx", "export_model --inference_only"],
           "another version of this code", do.metadata(TORCH, format_version=0)),
     *rows("another version's model", "export_model --format openvino", "another version of this code",
           do.version_0(ONNX))],

    # Damage.
    [row for name, command in (
        (f"{LGST}.pth", "CSAD"), (f"{MEMORY}.json", "patch_memory"), (f"{SCORES}_metrics.json", "report"),
        ("work/export_report.json", "export_model"), (f"{at.CKPT}/backbone.json", "CSAD --backbone auto"),
        (f"{at.MASKS}/info/filtered_histogram_indices.npy", "train_segmentor"), (TORCH, PREDICT),
        (TORCH, at.SERVE), (TORCH, "report"))
     for row in rows(f"half of {name}", command, "cannot be read", cut(name))],
    [row for content in ("{}", "[]") for name, commands in (
        (f"{LGST}.json", ["CSAD", "benchmark_performance"]), (f"{MEMORY}.json", ["export_model", "report"]),
        (f"{SCORES}_metrics.json", "report"), (f"{at.CKPT}/backbone.json", "CSAD --backbone auto"),
        (f"{at.MASKS}/info/pseudo_label.json", "train_segmentor"),
        (f"{at.MASKS}.unfinished/begun.json", "pseudo_label"),
        ("data_components/dataset.json", "make_synthetic_loco"))
     for row in rows(f"{content} in {name}", commands, "does not hold", write(name, content))],
    [row for name, content, commands in (
        (f"{LGST}.json", '{"used": 3, "scored": null, "outputs": {}}', ["CSAD", *LATER[1:]]),
        (f"{LGST}.json", '{"used": {}, "scored": 3, "outputs": {}}', ["report"]),
        (f"{at.MASKS}.unfinished/begun.json", '{"used": 3, "overwrites": null}', "pseudo_label"),
        (f"{at.CKPT}/backbone.json", '{"name": 3}', ["CSAD --backbone auto"]))
     for row in rows(f"values of other types in {name}", commands, "does not hold", write(name, content))],
    [row for change in (lambda saved: saved.update(meta=3), lambda saved: saved["meta"].pop("memory"))
     for row in rows("a checkpoint without what it was made from", "export_model", "not written by",
                     do.state(f"{MEMORY}.pth", change), *at.without_records(MEMORY))],
    rows("an export report of something else", ["report", "export_model --inference_only"], "does not hold",
         write("work/export_report.json", '[{"category": "pushpins"}]')),
    [row for damage in (cut(f"{SCORES}_torch_scores.csv"), write(f"{SCORES}_torch_scores.csv", "image\n"))
     for row in rows("half of a table of scores", "export_model --inference_only --format onnx",
                     "cannot be read", damage)],
    [row for model in (ONNX, XML)
     for row in rows("half a model", [f"{PREDICT} --model {model}", f"serve --model {model}"], "cannot",
                     cut(model))],
    [*rows("an OpenVINO model without .bin", f"{PREDICT} --model {XML}", "",
           remove(XML.replace(".xml", ".bin"))),
     *rows("a folder instead of a model", f"{PREDICT} --model work/ckpt", "model")],
    [*rows("half a mask", "benchmark_performance", "",
           cut(f"{at.DATA}/ground_truth/logical_anomalies/000/000.png")),
     *rows("half of the defects", "benchmark_performance", "", cut(f"{at.DATA}/defects_config.json"))],
    [*rows("weights that are none", "CSAD --backbone_weights data/x", "does not hold",
           write("data/x", "none")),
     *rows("foreign weights", f"CSAD --backbone_weights {TORCH}", "does not hold"),
     *rows("weights of another training", "CSAD --backbone wide_resnet50_2", "its name stands for",
           do.weights_of_v1(f"{at.CKPT}/wide_resnet50_2.pth"))],
    rows("a damaged archive of penalty pictures", "CSAD --overwrite --lgst.student pixels",
         "is not the published archive", write(f"{at.CKPT}/tiny-imagenet-200.zip", "PK")),
]
