#!/usr/bin/env bash
# The regularization images by img2dataset: many processes, or many machines with Spark or Ray. Same pictures, same numbers.
#
#   bash scripts/download_img2dataset.sh [options of download_regularization_images.py that choose the table]
#
#   distributor=multiprocessing bash scripts/download_img2dataset.sh --urls urls.parquet      # this machine (the default)
#   distributor=pyspark bash scripts/download_img2dataset.sh                                  # see below
#   distributor=ray bash scripts/download_img2dataset.sh                                      # ray start --head ... first
#
# Interrupted, the same command goes on with the shards that are missing. Writes $shards/ (img2dataset's), then
# regularization_images/ and regularization_images.jsonl, linked to the pictures in there where the disk is the same.
# img2dataset needs pandas < 3, so it lives in an environment of its own: .venv/img2dataset.
#
# Spark: with more than one machine, start a session with your cluster's master and call img2dataset.download(...) with the
# options below in it (github.com/rom1504/img2dataset, "Distributed"); $shards has to be a place that all machines see.
# Ray: RAY_ADDRESS says where the cluster is. img2dataset opens private addresses too, and waits as long as a server drips:
# give it a network from which nothing inside can be reached.
set -euo pipefail
cd "$(dirname "$0")/.."

distributor="${distributor:-multiprocessing}" # multiprocessing, pyspark or ray
shards="${shards:-regularization_images.shards}"
urls="${urls:-regularization_images.urls.parquet}" # the filtered table; made if it is not there
output_format="${output_format:-files}"            # or webdataset: one tar a shard, better on network disks
processes_count="${processes_count:-$(nproc)}"
thread_count="${thread_count:-256}" # a process
output_folder="${output_folder:-regularization_images}"
min_size="${min_size:-512}" image_size="${image_size:-512}"

. scripts/environment.sh
install requirements.txt

# 1. The table, filtered here: `row` keeps the pictures' numbers.
table_options="--min_size $min_size $*"
if [ -s "$urls" ] && [ "$(cat "$urls.options" 2> /dev/null || echo "$table_options")" != "$table_options" ]; then
    echo "error: $urls was made with other options; remove it, or set urls=" >&2
    exit 2
fi
if [ ! -s "$urls" ]; then
    echo "$table_options" > "$urls.options"
    python download_regularization_images.py --min_size "$min_size" "$@" --write_urls "$urls"
fi

# 2. The pictures.
tool="${img2dataset:-.venv/img2dataset/bin/img2dataset}"
if [ ! -x "$tool" ]; then
    python3 -m venv .venv/img2dataset
    .venv/img2dataset/bin/python -m pip install --quiet "img2dataset==1.47.*" "pandas<3"
fi
case "$distributor" in
    multiprocessing) ;;
    pyspark | ray) "$(dirname "$tool")/python" -m pip install --quiet "$distributor" ;;
    *) echo "error: distributor=$distributor: should be multiprocessing, pyspark or ray" >&2; exit 2 ;;
esac
"$tool" --url_list "$urls" --input_format parquet --url_col url --caption_col caption --save_additional_columns '["row"]' \
    --output_folder "$shards" --output_format "$output_format" --distributor "$distributor" \
    --processes_count "$processes_count" --thread_count "$thread_count" --number_sample_per_shard "${shard_size:-10000}" \
    --image_size "$image_size" --resize_mode keep_ratio --resize_only_if_bigger True --min_image_size "$min_size" \
    --encode_quality 95 --timeout 10 --user_agent_token align_sd --compute_hash None

# 3. The rows and pictures that train_lora.py reads.
python download_regularization_images.py --from_img2dataset "$shards" --output_folder "$output_folder" --min_size "$min_size"
