"""What happens to a run: disks, permissions, other runs, interruptions, folders that go, requests."""

from functools import partial
from signal import SIGINT, SIGTERM

from faults import processes
from faults.pictures import png_header
from faults.preparations import ran
from faults.row import LATER, OVERWRITING, PREDICT, SERVE, rows

ELSEWHERE = ["make_synthetic_loco --dataset_root more", "check_dataset --output sheets"]
EXPORTS = ["export_model --format onnx", "export_model --format openvino"]
STAGES = [*OVERWRITING, *LATER]
# fmt: off
GROUPS = [
    # Disks and permissions.
    rows("a full disk", [*STAGES, *EXPORTS, *ELSEWHERE, f"{PREDICT} --save_maps"], "disk is full",
         inside=processes.full_disk),
    rows("files may not grow", ["patch_memory --overwrite", "report", EXPORTS[1]], "",
         inside=processes.no_large_files),
    rows("nothing may be written", [PREDICT, f"{SERVE} --log more/log.jsonl", *STAGES, *ELSEWHERE],
         "permission", inside=processes.nothing_writable),
    rows("nobody reads the output", [PREDICT, SERVE, "pseudo_label", *LATER[1:], "check_dataset",
                                     ELSEWHERE[0]], "closed the pipe", inside=processes.no_reader),

    # Other runs.
    rows("another run in this workspace", STAGES, "process",
         inside=partial(processes.hold, "work/.csad.lock")),
    rows("another run in a seed's workspace", [f"{command} --seeds 3" for command in STAGES[1:]], "process",
         inside=partial(processes.hold, "work/seeds/3/.csad.lock")),
    rows("another run writes there", [f"{PREDICT} --output out", f"{PREDICT} --output out --watch"],
         "another predict.py", inside=partial(processes.hold, "out/.predict.lock")),
    rows("another run keeps the log", f"{SERVE} --log log.jsonl", "process",
         inside=partial(processes.hold, ".log.jsonl.lock")),

    # Interruptions: the same command goes on, and ends with the same files.
    [row for command in OVERWRITING[2:0:-1] for number in (SIGINT, SIGTERM)
     for row in rows(f"{number.name} in a training", command, "", ran(
         command, 128 + number, "interrupted; ", partial(processes.interrupt, 3, number)),
         status=0, inside=processes.must_go_on)],
    rows("a share is unmounted", f"{PREDICT} --watch --threshold=1e9", "2 lines written", status=0,
         inside=processes.outage),

    # Requests to the station.
    [row for said, headers, body in (
        ("does not answer under this name", {"Host": "station.example"}, b""),
        ("pages of other sites", {"Origin": "http://example.com"}, b""), ("there is no picture", {}, b""),
        ("needs a token", {"Authorization": "Bearer b"}, b""),
        ("MB when decoded", {}, png_header(7000, 7000, 16, 6)))
     for row in rows("a request", SERVE if "token" not in said else f"{SERVE} --token a", said, status=0,
                     inside=partial(processes.ask, headers, body))],
]
