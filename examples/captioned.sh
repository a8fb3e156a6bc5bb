#!/bin/sh
# Align on images of one's own: FOLDER has captions.jsonl (id, caption, file) and the images.
# usage: examples/captioned.sh FOLDER [KEY=VALUE ...]
set -eu
folder=$1
shift
exec vargpt-rl run name=captioned data=captioned data.captions="$folder/captions.jsonl" data.images="$folder" \
    preference.winners="$folder" iterations=1 'resolutions=[128]' "$@"
