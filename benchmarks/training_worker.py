"""transformers and PEFT in a process of their own, as a rival in training; see `llmkit.bench.training_worker`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmkit.bench.process import Answer, Settings, main
from llmkit.bench.training_worker import ALPHA, BETAS, LEARNING_RATE, RANK, WEIGHT_DECAY, Chat, Ids, TrainingModel
from llmkit.bench.training_worker import serve as serve_model
from llmkit.training.data.packing import IGNORE
from llmkit.training.loop import product_dtype


class TransformersTraining:
    """transformers and PEFT as their documentation shows them: right padding, labels of -100; in float32 on a CPU, on a GPU in bfloat16.

    A folder in bitsandbytes' 4 bits stays in them. What `peft.prepare_model_for_kbit_training` would upcast to float32 (embedding, head,
    norms) stays as it is, which takes gigabytes less.
    """

    def __init__(self, folder: str, device: str, checkpointing: bool) -> None:
        import transformers
        from peft import LoraConfig, get_peft_model

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.device = torch.device(device)
        self.dtype = product_dtype("auto", self.device)
        config, dtype = transformers.AutoConfig.from_pretrained(folder), self.dtype or torch.float32
        four_bit = getattr(config, "quantization_config", None)
        if four_bit is not None:  # its products are in the dtype of the original, which need not be the device's
            config.quantization_config = {**four_bit, "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, device_map={"": device})
        if four_bit is not None:
            for parameter in model.parameters():  # what is not in 4 bits is loaded as it is stored, whatever dtype says
                parameter.data = parameter.data.to(dtype) if parameter.is_floating_point() else parameter.data
        model.config.use_cache = False
        attention = model.config._attn_implementation
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        products = str(dtype).removeprefix("torch.")
        self._flags = f"{products}, {attention} attention{', gradient checkpointing' if checkpointing else ''}"
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: nn.Module = get_peft_model(model, lora).train()
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        fused = self.device.type == "cuda" or None  # as its Trainer has it
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            trained, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=fused
        )

    def full(self, ids: Ids) -> float:
        tokens = torch.from_numpy(ids).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is not None):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self._update()
        return float(loss.item())

    def chats(self, chats: Sequence[Chat], micro_batch: int) -> tuple[float, int]:
        targets = torch.tensor(sum(int(learned[1:].sum()) for _, learned in chats))
        total, slots = 0.0, 0
        for start in range(0, len(chats), micro_batch):
            tokens, mask, labels = padded(chats[start : start + micro_batch])
            loss = self.model(input_ids=tokens, attention_mask=mask, labels=labels, num_items_in_batch=targets).loss
            loss.backward()
            total += float(loss.item())
            slots += tokens.numel()
        self._update()
        return total, slots

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def report(self) -> dict[str, Any]:
        versions = {f"{name}_version": importlib.metadata.version(name) for name in ("transformers", "peft")}
        if getattr(self.model, "is_loaded_in_4bit", False):
            versions["bitsandbytes_version"] = importlib.metadata.version("bitsandbytes")
        return {"flags": f"{self._flags}, torch {torch.__version__}, {torch.get_num_threads()} threads", **versions}


def padded(chats: Sequence[Chat]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels `[chats, longest]`, int64, padded on the right."""
    shape = (len(chats), max(len(ids) for ids, _ in chats))
    tokens, mask, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    for row, (ids, learned) in enumerate(chats):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1
        labels[row, : len(ids)] = np.where(learned, ids, IGNORE)
    return torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(labels)


def load_rival(settings: Settings) -> TrainingModel:
    """Load the model of the settings with PEFT's adapter."""
    return TransformersTraining(settings["folder"], settings["device"], settings["checkpointing"])


def serve(settings: Settings, answer: Answer) -> None:
    """Take optimizer steps as they are asked for, until standard input ends."""
    serve_model(settings, answer, load_rival)


if __name__ == "__main__":
    main(serve)
