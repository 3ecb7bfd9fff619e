"""Data sets and pictures: what is left out or not read as people see it, layouts, few images, label maps."""

from faults import preparations as do
from faults.pictures import CASES, GREY, ODD
from faults.preparations import cut, folder, keep_images, link, remove, rename, take, write
from faults.row import DATA, MASKS, OVERWRITING, PREDICT, TEST, TRAIN, VALIDATION, rows

LABELS = "filtered_cluster_map.png"
LONG = "y" * 245 + ".png"
HAND_MADE = remove(f"{MASKS}/info/pseudo_label.json")
# fmt: off
GROUPS = [
    # Left out without a count.
    [*rows("an empty folder", "predict more", "no images", folder("more")),
     *rows("a folder with other files only", "predict more", "no images", write("more/a.pdf")),
     *rows("a folder called x.png", "predict more", "no images", folder("more/x.png")),
     *rows("a folder that links to itself", "predict more", "no images", folder("more"),
           link("more/again", "../more"))],
    [*rows("one of three is no picture", PREDICT, "1 unreadable", write("photos/b.webp", "none"), status=3),
     *rows("a linked folder with a bad picture", PREDICT, "1 unreadable", write("more/b.webp", "none"),
           link("photos/linked", "../more"), status=3)],
    [*rows("good and bad in one folder", "train_segmentor --overwrite", "good ones",
           rename(f"{TRAIN}/000.png", "defect/0.png")),
     *rows("folders of two layouts", "CSAD --overwrite", "two layouts", folder(f"{DATA}/train/ok"))],
    rows("an empty train/good", ["check_dataset", *OVERWRITING], "no images", keep_images(TRAIN, 0)),
    [*rows("an empty test folder", "patch_memory --overwrite", "no images",
           keep_images(f"{DATA}/test/logical_anomalies", 0)),
     *rows("an empty validation folder", "patch_memory --overwrite", "no images",
           keep_images(VALIDATION, 0))],
    [*rows("a category that there is not", "benchmark_performance --categories none", "no category"),
     *rows("a data set that there is not", "report --dataset_root none", "does not exist")],
    rows("no test images", ["benchmark_performance", "report"], "no good test images",
         remove(f"{DATA}/test")),
    rows("no anomalies to choose by", "CSAD --overwrite --checkpoint best_on_test", "there are none",
         remove(f"{DATA}/test/logical_anomalies"), remove(f"{DATA}/test/structural_anomalies")),
    [*rows("a link to nothing", "check_dataset", "odd.png: a link", link(f"{TRAIN}/odd.png", "nowhere.png"),
           status=4),
     *rows("what Windows leaves", "check_dataset", "made by the operating system",
           write(f"{TRAIN}/Thumbs.db"), write(f"{TEST}/desktop.ini"), status=4)],

    # Other layouts.
    [row for said, paths in (
        ("VisA's layout", ["Data/Images/Normal"]), ("Real-IAD's layout", ["OK/S0001", "NG/BX/S0002"]),
        ("folder Train", ["Train"]), ("folders OK, bad", ["OK", "bad"]))
     for row in rows(said, ["check_dataset --dataset_root more", "pseudo_label --dataset_root more"], said,
                     *(folder(f"more/cup/{path}") for path in paths))],

    # Not read as people see it. In a data set a link to nothing is left out and named.
    [row for name, suffix, make, said in ODD
     for row in rows(name, PREDICT, said, make(f"photos/odd{suffix}"), status=3)],
    [row for index, (name, suffix, make, said) in enumerate(odd for odd in ODD if "link" not in odd[0])
     for row in rows(name, ["check_dataset", (OVERWRITING[0], *OVERWRITING[2:])[index % 3]], said,
                     remove(f"{TRAIN}/004.png"), make(f"{TRAIN}/odd{suffix}"))],
    [*rows("a lossy mask", "check_dataset --dataset_root more", "masks in a lossy format",
           do.copy_tree("more", CASES / "mini_mvtec_ad"),
           do.as_jpeg("more/cup/ground_truth/crack/000_mask.png"), status=4),
     *rows("a lossy mask of several values", ["check_dataset", "benchmark_performance"],
           "keeps no exact values", do.as_jpeg(f"{DATA}/ground_truth/logical_anomalies/000/000.png"))],

    # Names.
    rows("a name too long for a drawing's", f"{PREDICT} --save_maps --threshold=1e9", LONG,
         rename("photos/000.png", LONG), status=0),
    rows("a name that spreadsheets compute", f"{PREDICT} --threshold=1e9", "2 normal",
         rename("photos/000.png", "=1+1.png"), status=0),

    # Few images.
    [row for count, command in enumerate(("patch_memory --overwrite", "check_dataset", "CSAD --overwrite"), 1)
     for row in rows(f"{count} training images", command, "at least", keep_images(TRAIN, count))],
    rows("4 training images and no other", "pseudo_label --overwrite", "at least", keep_images(TRAIN, 4),
         remove(f"{DATA}/validation")),
    [*rows("what few images mean", "check_dataset", "expect that many new good images", status=4),
     *rows("more rows than patches", "patch_memory --overwrite --memory.rows 1000000", "--memory.rows")],

    # Label maps.
    rows("label maps of other images", "train_segmentor --overwrite", "pseudo_label.py",
         *(take(f"{MASKS}/{index:03d}/{LABELS}", f"../{index - 1:03d}/{LABELS}") for index in range(1, 10))),
    [row for made_by in ([HAND_MADE], []) for name in (LABELS, "background.jpg")
     for row in rows(f"a replaced {name}", "train_segmentor", "label_maps: ", *made_by,
                     *(do.roll(f"{MASKS}/{index:03d}/{name}") for index in range(10)))],
    [row for name in (LABELS, "refined_masks.png", "background.jpg")
     for row in rows(f"a {name} of another size", "train_segmentor --overwrite", "the size of its image",
                     HAND_MADE, *(do.resize(f"{MASKS}/00{index}/{name}", 200, 100) for index in range(10)))],
    rows("label maps of mixed sizes", "train_segmentor --overwrite", "pseudo-labels of mixed sizes",
         HAND_MADE,
         *(do.resize(f"{TRAIN}/{index:03d}.png", 320, 320) for index in range(10)),
         *(do.resize(f"{MASKS}/{index:03d}/{name}", 320, 320) for index in range(0, 10, 2)
           for name in (LABELS, "refined_masks.png", "background.jpg"))),

    # Nothing finished is harmed.
    [row for split, commands in ((VALIDATION, OVERWRITING[1:]), (TEST, OVERWRITING[1:]),
                                 (TRAIN, (OVERWRITING[0], *OVERWRITING[2:])))
     for row in rows(f"a truncated image in {split}", commands, "cannot be read", cut(f"{split}/000.png"))],
    [*rows("an empty region of interest", "CSAD --overwrite", "roi", do.save(f"{DATA}/roi.png", GREY * 0)),
     *rows("sheets among the pictures", f"check_dataset --output {TRAIN}", "another folder")],
]
