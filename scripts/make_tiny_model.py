#!/usr/bin/env python3
"""Make a tiny random Llama-shape model with its tokenizer: offline, deterministic, in well under a second.

For tests and dry runs. It loads in transformers and in vLLM (head size 32), knows ChatML, and stops by
itself now and then, so that a batch holds both finished and truncated responses. The tokenizer is a
byte-level BPE with a few merges: every text has an encoding, and one text has several, so code that
wrongly re-tokenises responses is caught.

    python scripts/make_tiny_model.py FOLDER [--seed 0] [--hidden 64] [--layers 2] [--untied]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Ids 0 to 3, the first three as in SmolLM.
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
UNK, _, EOS, PAD = range(4)
HEAD_SIZE = 32  # the smallest that vLLM's CPU attention takes
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = """
    the and that have for not with you this but his from they say her she will one all would there their
    what about which when make can like time just him know take people into year your good some could
    them see other than then now look only come its over think also back after use two how our work
    first well way even new want because any these give day most is are was were user assistant system
    answer question please
""".split()  # noqa: SIM905


def make_tiny_tokenizer(*, vocab: int = 384, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `vocab` tokens: 4 special ones, 256 bytes, then merges.

    `vocab` is 260 (no merges: one token a byte) to about 500.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = make_merges()[: vocab - len(pieces)]
    pieces += [left + right for left, right in merges]
    if len(pieces) != vocab:
        raise ValueError(f"vocab must be 260 to {260 + len(make_merges())}, got {vocab}")
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=SPECIALS[EOS],
        pad_token=SPECIALS[PAD],
        unk_token=SPECIALS[UNK],
        chat_template=CHATML if chat_template else None,
        clean_up_tokenization_spaces=False,
    )


def make_merges() -> list[tuple[str, str]]:
    """Merges that build each of WORDS from left to right, behind a space ("Ġ" in byte-level BPE)."""
    merges: dict[tuple[str, str], None] = {}  # an ordered set
    made: set[str] = set()
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            if left + letter not in made:
                merges[left, letter] = None
                made.add(left + letter)
            left += letter
    return list(merges)


def make_tiny_model(
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    kv_heads: int = 1,
    vocab: int = 384,
    max_length: int = 1024,
    tied: bool = True,
    chat_template: bool = True,
    kind: Literal["lm", "reward"] = "lm",
    init_std: float = 0.1,
    eos_boost: float = 2.0,
) -> Path:
    """Write a Hugging Face folder (fp32 safetensors, config, tokenizer, generation config) to `path`.

    hidden: a multiple of 32, the head size; hidden // 32 must be a multiple of kv_heads.
    kind: "lm" for a causal LM, "reward" for a sequence classifier with one label (a scalar reward).
    init_std: larger gives more peaked next-token distributions.
    eos_boost: raises the logit of <|im_end|>, a few percent a token at 2; 0 makes it as rare as any other.
    The global random state is left as it was; the same arguments give the same bytes.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils import logging

    if hidden % HEAD_SIZE or (hidden // HEAD_SIZE) % kv_heads:
        raise ValueError(f"hidden must be a multiple of {HEAD_SIZE} * kv_heads, got {hidden}, {kv_heads=}")
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=max_length,
        initializer_range=init_std,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=tied,
        num_labels=1,
        dtype="float32",
    )
    tokenizer = make_tiny_tokenizer(vocab=vocab, chat_template=chat_template)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = (LlamaForCausalLM if kind == "lm" else LlamaForSequenceClassification)(config).float()
        if kind == "lm":
            # Coordinate 0 of the residual stream is the same at every position (each embedding sets it, no
            # layer writes to it), and the head's row for EOS reads it: Llama's head has no bias.
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[0] = 0
                layer.mlp.down_proj.weight[0] = 0
            model.lm_head.weight[:, 0] = 0
            model.model.embed_tokens.weight[:, 0] = 10 * init_std
            model.lm_head.weight[EOS, 0] += eos_boost
            model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path)
    finally:
        if bars:
            logging.enable_progress_bar()
    tokenizer.save_pretrained(path)
    return Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=64, help="hidden size, a multiple of 32 (%(default)s)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=384, help="260 to about 500 (%(default)s)")
    parser.add_argument("--untied", action="store_true", help="an LM head of its own")
    parser.add_argument("--no-chat-template", action="store_true")
    parser.add_argument("--reward", action="store_true", help="a reward model (one label), not a causal LM")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    make_tiny_model(
        args.path,
        seed=args.seed,
        hidden=args.hidden,
        layers=args.layers,
        vocab=args.vocab,
        tied=not args.untied,
        chat_template=not args.no_chat_template,
        kind="reward" if args.reward else "lm",
    )
    print(args.path)


if __name__ == "__main__":
    main()
