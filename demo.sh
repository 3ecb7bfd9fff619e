#!/usr/bin/env bash
# Set up (on first use), render the built-in data set, run all stages on it and put everything on one page (report.html);
# on two categories or, with --all, on five.
#
#   ./demo.sh [--all] [--small] [--workspace FOLDER] [--seed N]
#
# --small is a first look in under three minutes on two cores: one category with a third of the images.
# Without --workspace, what differs in pictures has a folder of its own: demo_workspace, demo_workspace_small,
# demo_workspace_seed_N.
set -euo pipefail
cd "$(dirname "$0")"

demo="./demo.sh$([ $# -eq 0 ] || printf ' %q' "$@")"
categories="pushpins screw_bag"
workspace=""
seed=0
images=""
while [ $# -gt 0 ]; do
    case "$1" in
        --all) categories="breakfast_box juice_bottle pushpins screw_bag splicing_connectors" ;;
        --small)
            categories="pushpins"
            images="--train 60 --validation 20 --test_good 20 --test_logical 20 --test_structural 20" ;;
        --workspace) workspace="${2:?--workspace needs a folder}"; shift ;;
        --seed) seed="${2:?--seed needs a number}"; shift ;;
        -h | --help) awk 'NR > 1 && !/^#/ {exit} NR > 1 {sub(/^# ?/, ""); print}' demo.sh; exit ;;
        *) echo "error: unknown option $1; there are --all, --small, --workspace FOLDER and --seed N" >&2; exit 2 ;;
    esac
    shift
done
if [ -z "$workspace" ]; then
    workspace="demo_workspace${images:+_small}"
    [ "$seed" = 0 ] || workspace="${workspace}_seed_$seed"
fi

step=0
steps=8
announce() {
    step=$((step + 1))
    echo
    echo "$step of $steps: $1"
}
# The stages say that "the same command" continues: here that is the one for all of them.
at_exit() {
    local status=$? at=""
    [ $step -eq 0 ] || at=" at step $step of $steps"
    case $status in
        0) ;;
        130 | 143) echo "interrupted$at; $demo continues from there" >&2 ;;
        *) [ $step -eq 0 ] || echo "stopped$at; once its cause is removed, $demo continues from there" >&2 ;;
    esac
}
trap at_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

. .ci/setup_environment.sh

# Stand-ins by name, so that the demo is the same on every machine, with or without downloads.
dataset="$workspace/datasets/synthetic_loco"
stage=(--workspace "$workspace" --dataset_root "$dataset" --categories $categories --preset quick --seed "$seed")
side_by_side=(--jobs 2)

announce "rendered pictures (make_synthetic_loco.py)"
"$python" make_synthetic_loco.py --dataset_root "$dataset" --categories $categories --seed "$seed" $images
announce "semantic pseudo-labels, by a classical stand-in (pseudo_label.py)"
"$python" pseudo_label.py "${stage[@]}" "${side_by_side[@]}" --backbone efficientnet_lite0 --pseudo_labels.proposer classical
announce "component segmentor, patch histogram (train_segmentor.py)"
"$python" train_segmentor.py "${stage[@]}" "${side_by_side[@]}" --backbone efficientnet_lite0
announce "LGST, the student-teacher (CSAD.py)"
"$python" CSAD.py "${stage[@]}" "${side_by_side[@]}" --backbone efficientnet_lite0
announce "patch memory, DFM (patch_memory.py)"
"$python" patch_memory.py "${stage[@]}" "${side_by_side[@]}" --backbone efficientnet_lite0
announce "one model per category (export_model.py)"
"$python" export_model.py "${stage[@]}" "${side_by_side[@]}" --format torch
announce "score_combine_result.txt (benchmark_performance.py)"
"$python" benchmark_performance.py "${stage[@]}" > /dev/null
announce "report.html (report.py)"
"$python" report.py "${stage[@]}"

echo
cat "$workspace/score_combine_result.txt"
first="${categories%% *}"
cat <<TEXT

Everything lies in $workspace:
  report.html                       open this one: results, curves, every test image with what was found in it
  score_combine_result.txt          image AUROC per category and branch, localisation
  anomaly_score/                    scores of every image, one CSV per model
  ckpt/pytorch_models/              the deployable models
  datasets/synthetic_loco/          the rendered images, in MVTec LOCO AD's layout
  datasets/masks/                   pseudo-labels (filtered_cluster_map_color.png) and label maps of the test images

This model knows $first only. Score more pictures of $first with it, for example the test pictures:
  $python predict.py "$dataset/$first/test" --model "$workspace/ckpt/pytorch_models/$first.pth" --save_maps
TEXT
