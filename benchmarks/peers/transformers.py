"""transformers, float32, unpruned or with HAWK inserted as hawk_trt's parity reference does it.

Its variants are TorchStages': eager, sdpa and compiled. Prompt and image become tensors by hawk_trt's own code, whose
time counts, since transformers' own takes torchvision.
"""

import time

import torch

from benchmarks.peers.worker import Answer, Ask, arguments, serve
from benchmarks.torch_stages import TorchStages
from hawk_trt import Request
from hawk_trt.apps.parity.prompt_rules import prompt_tokens
from hawk_trt.bundle import Bundle
from hawk_trt.inputs.processor import Processor
from hawk_trt.models import load_family


def main() -> None:
    """Answer requests; --model is the bundle, beside its checkpoint."""
    args = arguments()
    torch.set_num_threads(args.threads)
    bundle = Bundle.load(args.model)
    processor = Processor(bundle, load_family(bundle.manifest.vision))
    model = TorchStages(args.model.parent / "checkpoint", bundle.manifest.head_weights.values, prompt_tokens(bundle))

    def answer(ask: Ask) -> Answer:
        model.use(ask.variant)
        begun = time.perf_counter()
        inputs = processor(Request(ask.prompt, [ask.image]))
        prepared = 1e3 * (time.perf_counter() - begun)
        times = model.run(inputs, ask.keep_ratio, ask.max_new_tokens)
        text = processor.chat.tokenizer.decode(times.token_ids) if processor.chat else ""
        return Answer(prepared + times.vision + times.prefill, times.decode_step, len(times.token_ids), text)

    serve(("torch", "transformers"), answer)


if __name__ == "__main__":
    main()
