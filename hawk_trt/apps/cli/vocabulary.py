"""What others call our commands, options and values, and a value that works for each option."""

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
# What others call values of ours.
VALUES = {
    "gpu": "cuda",
    "cuda:all": "cuda",
    "cpu:0": "cpu",
    "onnxruntime": "cpu",
    "trt": "tensorrt",
    "f16": "fp16",
    "f32": "fp32",
    "fp8": "fp16",
    "float8": "float16",
    "q4": "int4",
    "q8": "int8",
    "4bit": "int4",
    "8bit": "int8",
    "auto": "fp16",
}
# What others call our commands and options.
SYNONYMS = {
    "run": "ask answer generate infer inference predict query",
    "chat": "talk repl interactive shell prompt",
    "demo": "example examples try quickstart tour",
    "serve": "server start api launch up web",
    "export": "convert onnx import download pull quantize",
    "build": "compile engine engines trt tensorrt trtexec",
    "explain": "visualize visualise show draw picture plot",
    "parity": "compare diff validate verify",
    "eval": "evaluate evaluation accuracy score test",
    "bench": "benchmark perf profile speed measure",
    "calibrate": "calibration heads head-weights",
    "advise": "advice recommend tune suggest",
    "doctor": "check info env status diagnose list gpus",
}
OPTIONS = {
    "--max-new-tokens": "--max-length --max-output-tokens --num-predict --n-predict --num-tokens -n",
    "--max-tokens": "--max-new-tokens --max-length",
    "--prompt": "--question --text --message --instruction --query -q -t",
    "--image": "--img --images --picture --photo --image-path --input --file -f",
    "--keep-ratio": "--keep --ratio --retention-ratio --keep-rate --token-ratio -k -r",
    "--out": "--output --output-dir --out-dir --save-dir --save --dest --target-dir -d -o",
    "--model": "--model-path --model-id --bundle --engine --engines --path --input --checkpoint -m",
    "--checkpoint": "--ckpt --model-path --reference --hf-model",
    "--dtype": "--precision --torch-dtype --type",
    "--picture": "--out --output -o",
    "--device": "--backend --provider --accelerator",
    "--temperature": "--temp",
    "--repeats": "--runs --iterations --iters --num-iters --repeat --num-runs",
    "--host": "--listen --bind --address --ip",
    "--api-key": "--key --token --auth",
    "--max-batch": "--batch-size --max-num-seqs --batch",
    "--target": "--provider --runtime --format",
    "--keep-ratio 1": "--no-prune --no-pruning",
    "--count": "--limit --num-samples --max-samples --n-samples",
    "--device cuda": "--gpu --cuda --use-gpu",
    "--device cpu": "--cpu --no-gpu",
    "--dtype fp16": "--fp16 --half",
    "--dtype bf16": "--bf16",
    "--dtype int8": "--int8 --load-in-8bit --quantize",
    "--dtype int4": "--int4 --load-in-4bit",
}
LISTS = ("--keep-ratio", "--keep-ratios", "--selectors", "--selector", "--target", "--sides")
# What there is nothing of here, with a value.
FOREIGN = "--quantization --tensor-parallel-size -tp --gpu-memory-utilization --max-num-batched-tokens --swap-space"
# A value that works for an option, where the one that was given does not; any other option is left out.
WORKING = {
    **{"--keep-ratio": "0.2", "--keep-ratios": "1,0.2", "--sides": "448", "--selectors": "hawk,random"},
    **{"--max-new-tokens": "128", "--temperature": "0.7", "--top-p": "0.9", "--top-k": "50", "--seed": "0"},
    **{"--device": "cpu", "--target": "cpu", "--dtype": "fp16", "--normalization": "l2", "--block-size": "64"},
    **{"--port": "8000", "--host": "127.0.0.1", "--max-batch": "8", "--api-key": "KEY", "--dataset": "tiny"},
    **{"--image": "IMAGE.png", "--video": "VIDEO.mp4", "--picture": "kept.png", "--prompt": "What is shown here?"},
    **{"--checkpoint": "CHECKPOINT-OR-HUB-ID"},
}
# What a command writes to --out, where that is no bundle.
OUT = {"explain": "kept.png", "demo": "kept.png", "calibrate": "weights.json", "eval": "results"}
# What stands before a command where a whole line was pasted.
OURSELVES = ("hawk-trt", "hawk_trt", "python", "python3", "-m")
ALIASES = {"-i": "--image", "--images": "--image", "-p": "--prompt", "--max-tokens": "--max-new-tokens"}
# What needs no option here: it is so anyway.
NEEDLESS = ("--stream", "--trust-remote-code", "--verbose", "--quiet", "--debug", "--yes", "-y")
