"""A plain eager PyTorch GPT-2 train step: the yardstick for `tools/benchmark.py train`.

The model is what one would write by hand after nanoGPT (fused QKV projection, scaled_dot_product_attention,
tied head), the step is forward, cross-entropy, backward, clipping at norm 1 and AdamW. No torch.compile,
float32. The process keeps the memory that it frees, as mixlab's does, which serves both alike.

    taskset -c 0 python tools/benchmark_torch_peer.py [--steps=N] [--json]

prints tokens per CPU-second. Pin it to one core, as above: OpenMP threads that wait for work burn CPU time
too. Needs torch."""

import argparse
import json
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from mixlab.parallel import host_memory


class Block(nn.Module):
    def __init__(self, d_model: int, heads: int, ffn_width: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.output = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, ffn_width), nn.Linear(ffn_width, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, L, D = x.shape
        qkv = self.qkv(self.attention_norm(x)).split(D, dim=2)
        q, k, v = (y.view(B, L, self.heads, D // self.heads).transpose(1, 2) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(B, L, D))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, layers: int, d_model: int, heads: int, ffn_width: int, vocab_size: int, length: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(length, d_model)
        self.blocks = nn.Sequential(*(Block(d_model, heads, ffn_width) for _ in range(layers)))
        self.final_norm = nn.LayerNorm(d_model)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        logits = F.linear(self.final_norm(self.blocks(x)), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def measure(
    layers: int = 6,
    d_model: int = 384,
    heads: int = 6,
    ffn_width: int = 1536,
    vocab_size: int = 8192,
    length: int = 256,
    rows: int = 8,
    steps: int = 8,
) -> dict[str, float]:
    """CPU-seconds of whole train steps: the quickest and the median of `steps`, after two that are not
    counted, and tokens per CPU-second by the quickest."""
    torch.manual_seed(0)
    model = GPT(layers, d_model, heads, ffn_width, vocab_size, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(vocab_size, (rows, length + 1))
    seconds = []
    for _ in range(steps + 2):
        start = time.process_time()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        seconds.append(time.process_time() - start)
    seconds = sorted(seconds[2:])
    return {
        "cpu_seconds_per_step": seconds[0],
        "median_cpu_seconds_per_step": statistics.median(seconds),
        "tokens_per_cpu_second": rows * length / seconds[0],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    host_memory.keep_freed()
    result = measure(steps=arguments.steps)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(*(f"{name}: {value:,.4g}" for name, value in result.items()), sep="\n")
