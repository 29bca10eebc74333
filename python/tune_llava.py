"""The bottleneck in your own loop: plain PyTorch around FusedIB, for any LLaVA of Hugging Face.

python python/tune_llava.py MODEL DATA.json IMAGES OUTPUT
"""

import sys

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from vittle.data import Collator, LlavaDataset
from vittle_kernels import FusedIB

BETA, EPOCHS, BATCH_SIZE, LEARNING_RATE = 0.1, 1, 4, 2e-5


def main(model_path: str, data: str, images: str, output: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_path)
    loader = DataLoader(LlavaDataset(data, images), BATCH_SIZE, shuffle=True, collate_fn=Collator(processor))

    layers = model.get_decoder().layers
    bottleneck = FusedIB(model.config.text_config.hidden_size)
    batch, kl = {}, []

    def insert(layer, inputs, output):
        hidden_states = output[0] if isinstance(output, tuple) else output
        vision = batch["input_ids"] == model.config.image_token_id
        result = bottleneck(hidden_states, vision, batch["instruction_mask"])
        kl[:] = [result.kl_vision + result.kl_text]
        rest = output[1:] if isinstance(output, tuple) else None
        return result.hidden_states if rest is None else (result.hidden_states, *rest)

    layers[len(layers) * 3 // 4 - 1].register_forward_hook(insert)  # after 24 of 32 layers
    parameters = [*model.get_decoder().parameters(), *bottleneck.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    steps = EPOCHS * len(loader)
    for step, batch in enumerate(batch for _ in range(EPOCHS) for batch in loader):
        bottleneck.set_alpha(0.5 / (1 + torch.tensor(-10 * (step / steps - 0.5)).exp().item()))
        inputs = {name: value for name, value in batch.items() if name != "instruction_mask"}
        ce = model(**inputs).loss
        (ce + BETA * kl[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{steps}: CE {ce.item():.3f}, KL {kl[0].item():.3f}")
    bottleneck.set_alpha(0.5)
    model.save_pretrained(output)
    save_file(bottleneck.state_dict(), f"{output}/bottleneck.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
