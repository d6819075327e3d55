#!/usr/bin/env bash
# The tiny model: export, engines on this Jetson (each compared with ONNX Runtime), an answer from a fifth of the tokens.
set -euo pipefail
folder="$(mktemp -d)"
tiny="$(python3 -c 'import hawk_trt.data, pathlib; print(pathlib.Path(hawk_trt.data.__path__[0], "tiny_vlm"))')"
hawk-trt doctor
hawk-trt export "$tiny" --out "$folder/tiny"
hawk-trt build "$folder/tiny" --out "$folder/engines"
hawk-trt run "$folder/engines" --image "$tiny/samples/0-colour.png" --prompt "What colour is the heart?" \
  --keep-ratio 0.2 | tee "$folder/answer"
grep -qx cyan "$folder/answer"
