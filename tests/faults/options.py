"""Options, settings, paths and devices that cannot be."""

from faults.preparations import write
from faults.processes import own_configs
from faults.row import DATA, LATER, ONNX, OVERWRITING, PREDICT, SERVE, rows

ON_DEVICES = [*OVERWRITING, "export_model", PREDICT, SERVE]
# fmt: off
GROUPS = [
    # Numbers that are not finite, or no numbers.
    [row for value in ("nan", "inf", "-inf", "x")
     for row in rows("a threshold", [f"{command} --threshold={value}" for command in (PREDICT, SERVE)],
                     "threshold")],
    [row for value in ("nan", "0", "1", "-0.1", "inf")
     for row in rows("a rate", [f"{command} --false_positive_rate={value}"
                                for command in (PREDICT, SERVE, "check_dataset")],
                     "false_positive_rate")],
    [row for name in ("body_seconds", "max_megabytes", "max_megapixels", "header_seconds", "batch_wait_ms")
     for row in rows("a limit", f"{SERVE} --{name} inf", name)],
    [row for script, name in (("CSAD", "lgst.lr"), ("train_segmentor", "segmentor.lr"))
     for row in rows("a loss that is not finite", f"{script} --overwrite --{name}=1e30", f"--{name}")],

    # Settings.
    [row for script, name, values, said in (
        ("CSAD", "lgst.steps", ("010", "1:30", "true", "1e3", "0x10", "1_000", "0"), "lgst.steps"),
        ("CSAD", "lgst.steps", ("'[1'",), "YAML"), ("CSAD", "lgst.lr", (".inf",), "lgst.lr"),
        ("CSAD", "lgst.batch_size", ("0",), "lgst.batch_size"),
        ("patch_memory", "memory.rows", ("inf",), "memory.rows"),
        ("patch_memory", "memory.score_share", ("nan",), "memory.score_share"),
        ("patch_memory", "images.size", ("300",), "images.size"),
        ("pseudo_label", "images.white_level", (".inf",), "white_level"),
        ("pseudo_label", "pseudo_labels.bandwidth", ("-1", "0"), "bandwidth"),
        ("train_segmentor", "segmentor.lr", (".nan",), "segmentor.lr"),
        ("train_segmentor", "segmentor.batch_size", ("1",), "segmentor.batch_size"),
        ("train_segmentor", "segmentor.unsupervised_from_epoch", ("4",), "after the last epoch"))
     for row in rows("a setting", [f"{script} --overwrite --{name}={value}" for value in values], said)],
    [*rows("a key twice in a category's settings", "CSAD", "occurs twice",
           write("configs/categories/pushpins.yaml", "lgst:\n  steps: 20\nlgst:\n  width: 16\n"),
           inside=own_configs),
     *rows("a key twice in defects_config.json", "benchmark_performance", "occurs twice",
           write(f"{DATA}/defects_config.json", '[{"pixel_value": 9, "pixel_value": 8}]'))],

    # Options.
    rows("an option that there is not", [f"{command} --nonsense 1" for command in (
        *OVERWRITING, *LATER, PREDICT, SERVE, "check_dataset", "make_synthetic_loco")], "--nonsense"),
    rows("a seed that is none", ["CSAD --seed=-1", "CSAD --seed=1.5",
                                 "train_segmentor --seed=99999999999999999999",
                                 "make_synthetic_loco --seed=-1"], "seed"),
    [*rows("a preset that there is not", "CSAD --preset fast", "preset"),
     *rows("a branch that there is not", "export_model --branches LGST none", "none"),
     *rows("a precision that cannot be", "export_model --precision int8", "int8"),
     *rows("a format that there is not", "export_model --format tflite", "tflite")],
    [*rows("a file to be watched", "predict photos/000.png --watch", "folders"),
     *rows("no batch", f"{PREDICT} --batch_size 0", "batch_size"),
     *rows("a cluster's option without one", f"{PREDICT} --shard_size 3", "--ray")],
    [*rows("an empty token", f"{SERVE} --token ''", "token"),
     *rows("two models of one name", f"{SERVE} {ONNX}", "rename"),
     *rows("a port that there is not", f"{SERVE} --port 70000", "port"),
     *rows("a URL for a host", f"{SERVE} --allowed_hosts http://x", "--allowed_hosts")],
    [row for name, value in (("image_size", 10), ("train", -1), ("workers", 0))
     for row in rows("a number for a data set", f"make_synthetic_loco --dataset_root more --{name}={value}",
                     name)],
    rows("pictures larger than any memory", "make_synthetic_loco --dataset_root more --image_size 100000000",
         "memory"),
    rows("jobs that are only named, of a network that is not there",
         "CSAD --dry_run --backbone wide_resnet50_2", "pushpins", status=0),

    # Paths.
    [*rows("~ where the shell leaves it alone", f"{PREDICT} --model=~/none.pth", "/none.pth is missing"),
     *rows("~ in a log's or a data set's name", [f"{SERVE} --log=~/file/log.jsonl",
                                                 "make_synthetic_loco --dataset_root=~/file/x"],
           "cannot be used", write("home/file")),
     *rows("an empty path", f"{PREDICT} --model=", "empty path")],
    rows("a file in a folder's place", ["CSAD --workspace file", f"{PREDICT} --output file"],
         "cannot be used", write("file")),

    # Devices.
    rows("a device that there is not", [f"{command} --device {device}" for command in ON_DEVICES
                                        for device in ("cuda:99", "nonsense")], "device"),
    rows("the device meta", [f"{command} --device meta"
                             for command in (*ON_DEVICES, f"{PREDICT} --model {ONNX}")], "meta"),
]
