"""Write a tiny random-weight llama model with a real tokenizer: the same bytes every time.

    python tools/make_tiny_gguf.py SOURCE.gguf OUT.gguf

SOURCE lends only its tokenizer. The result (5 MB) runs some 1,000 tokens/s on one CPU thread, which is what
lifecycle, cancellation, error and determinism tests need of an engine; what it says means nothing. Most of the
time to make it goes into reading the source's metadata, so the Makefile keeps the result.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

EMBEDDING, LAYERS, HEADS, KV_HEADS = 64, 2, 4, 2
HEAD = EMBEDDING // HEADS
Q8 = gguf.GGMLQuantizationType.Q8_0


class TinyModel:
    """A llama model in the making; the order of its tensors decides which random numbers each one gets."""

    def __init__(self, out: Path) -> None:
        self._writer = gguf.GGUFWriter(out, "llama")
        self._random = np.random.Generator(np.random.PCG64(0))

    def describe(self) -> None:
        writer = self._writer
        writer.add_name("llorch-tiny-random")
        writer.add_context_length(2048)
        writer.add_embedding_length(EMBEDDING)
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(2 * EMBEDDING)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(HEAD)
        writer.add_rope_freq_base(10000.0)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    def borrow_tokenizer(self, source: Path) -> int:
        """Copy every tokenizer entry of `source`; return the size of its vocabulary, in tokens."""
        vocabulary = 0
        for key, field in gguf.GGUFReader(source).fields.items():
            if not key.startswith("tokenizer."):
                continue
            value = field.contents()
            self._writer.add_key_value(key, value, *field.types[:2])
            if key == "tokenizer.ggml.tokens":
                vocabulary = len(value)
        self._writer.add_vocab_size(vocabulary)
        return vocabulary

    def add_tensors(self, vocabulary: int) -> None:
        self._weight("token_embd.weight", vocabulary, EMBEDDING, scale=0.5)
        self._norm("output_norm.weight")
        for block in range(LAYERS):
            self._add_block(f"blk.{block}.")

    def save(self) -> None:
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()

    def _add_block(self, prefix: str) -> None:
        self._norm(f"{prefix}attn_norm.weight")
        self._norm(f"{prefix}ffn_norm.weight")
        self._weight(f"{prefix}attn_q.weight", HEADS * HEAD, EMBEDDING)
        self._weight(f"{prefix}attn_k.weight", KV_HEADS * HEAD, EMBEDDING)
        self._weight(f"{prefix}attn_v.weight", KV_HEADS * HEAD, EMBEDDING)
        self._weight(f"{prefix}attn_output.weight", EMBEDDING, HEADS * HEAD)
        self._weight(f"{prefix}ffn_gate.weight", 2 * EMBEDDING, EMBEDDING)
        self._weight(f"{prefix}ffn_up.weight", 2 * EMBEDDING, EMBEDDING)
        self._weight(f"{prefix}ffn_down.weight", EMBEDDING, 2 * EMBEDDING)

    def _weight(self, name: str, rows: int, columns: int, *, scale: float = 0.3) -> None:
        values = (self._random.standard_normal((rows, columns)) * scale).astype(np.float32)
        self._writer.add_tensor(name, gguf.quants.quantize(values, Q8), raw_dtype=Q8)

    def _norm(self, name: str) -> None:
        self._writer.add_tensor(name, np.ones(EMBEDDING, dtype=np.float32))


def main(source: Path, out: Path) -> None:
    model = TinyModel(out)
    model.describe()
    model.add_tensors(model.borrow_tokenizer(source))
    model.save()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
