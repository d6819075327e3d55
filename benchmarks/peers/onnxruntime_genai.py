"""onnxruntime-genai over the graphs that mobius-onnx makes of the checkpoint; unpruned, for it prunes nothing."""

import json
import time

import onnxruntime_genai as og

from benchmarks.peers.worker import Answer, Ask, arguments, serve


def main() -> None:
    """Answer requests."""
    args = arguments()
    config = og.Config(str(args.model))
    options = {"intra_op_num_threads": args.threads}
    names = ("decoder", "vision", "embedding")
    config.overlay(json.dumps({"model": {name: {"session_options": options} for name in names}}))
    model = og.Model(config)
    processor = model.create_multimodal_processor()
    template = (args.model / "chat_template.jinja").read_text()

    def answer(ask: Ask) -> Answer:
        begun = time.perf_counter()
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ask.prompt}]}]
        tokenizer = og.Tokenizer(model)
        prompt = tokenizer.apply_chat_template(json.dumps(messages), template_str=template, add_generation_prompt=True)
        inputs = processor(prompt, images=og.Images.open(ask.image))
        length = inputs["input_ids"].shape()[-1] + ask.max_new_tokens
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.set_inputs(inputs)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(ask.max_new_tokens - 1):
            generator.generate_next_token()
        ended = time.perf_counter()
        tokens = generator.get_sequence(0)[-ask.max_new_tokens :]
        later = 1e3 * (ended - first) / max(len(tokens) - 1, 1)
        return Answer(1e3 * (first - begun), later, len(tokens), tokenizer.decode(tokens))

    serve(("onnxruntime-genai", "onnxruntime", "mobius-onnx"), answer)


if __name__ == "__main__":
    main()
