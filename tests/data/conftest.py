"""Tokenizers small enough to train on the spot."""

import json

import pytest

PARTS = ("the quick brown fox", "jumps over", "the lazy dog", "12345", "长上下文", "\n", "naïve ")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A model directory with a BPE, an end token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<eos>", "<|user|>", "<|bot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(PARTS)] * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<|bot|>' if m.role == 'assistant' else '<|user|>' }}\n"
        "{{ m.content }}{{ '<eos>' }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>\n{% endif %}"
    )
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "chat_template": template})
    )
    return directory
