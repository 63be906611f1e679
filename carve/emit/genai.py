"""``genai_config.json``: lets onnxruntime-genai run the artifact (C++, C#, Java, Android, iOS)."""

from __future__ import annotations

from typing import Any

from carve.program import Program


def genai_config(program: Program, facts: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a decoder, type ``decoder`` (the generic one).

    ``facts`` are the manifest's facts about the model.
    """
    eos = facts["eos_token_ids"] or [facts["bos_token_id"] or 0]
    bos = facts["bos_token_id"] if facts["bos_token_id"] is not None else eos[0]
    heads = program.config.get("num_attention_heads") or program.config.get("n_head")
    hidden = program.config.get("hidden_size") or program.config.get("n_embd")
    return {
        "model": {
            "type": "decoder",
            "vocab_size": facts["vocab_size"],
            "context_length": facts["max_length"],
            "bos_token_id": bos,
            "eos_token_id": eos if len(eos) > 1 else eos[0],
            "pad_token_id": eos[0],
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "onnx/model.onnx",
                "head_size": facts["head_dim"],
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "num_hidden_layers": facts["num_layers"],
                "num_key_value_heads": facts["num_key_value_heads"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": facts["max_length"],
            "min_length": 0,
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
            "length_penalty": 1.0,
            "early_stopping": True,
            "no_repeat_ngram_size": 0,
            "diversity_penalty": 0.0,
            "past_present_share_buffer": True,
        },
    }
