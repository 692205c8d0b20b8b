import pytest
import torch

from hyperadam.rule import attention_projections

FOUND = {
    "torch": (
        ["0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight"],
        ["0.linear1.weight", "0.linear2.weight", "output.weight"],
    ),
    "torch, of other widths": (
        ["m.q_proj_weight", "m.k_proj_weight", "m.v_proj_weight", "m.out_proj.weight"],
        ["m.in_proj_bias", "m.out_proj.bias"],
    ),
    "bert": (
        [
            "attention.self.query.weight",
            "attention.self.key.weight",
            "attention.self.value.weight",
            "attention.output.dense.weight",
        ],
        ["intermediate.dense.weight", "output.dense.weight", "pooler.dense.weight"],
    ),
    "llama": (
        ["attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight", "attn.o_proj.weight"],
        ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"],
    ),
    "llama, as released": (
        ["attention.wq.weight", "attention.wk.weight", "attention.wo.weight"],
        [],
    ),
    "gpt-2": (
        ["h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"],
        ["h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"],
    ),
    "gpt-2's of two inputs": (["cross.c_attn.weight", "cross.q_attn.weight"], []),
    "neox": (
        ["attention.query_key_value.weight", "attention.dense.weight"],
        ["mlp.dense_h_to_4h.weight"],
    ),
    "t5": (
        ["SelfAttention.q.weight", "SelfAttention.k.weight", "SelfAttention.o.weight"],
        ["DenseReluDense.wi.weight", "DenseReluDense.wo.weight"],
    ),
    "distilbert": (["a.q_lin.weight", "a.k_lin.weight", "a.out_lin.weight"], ["ffn.lin1.weight"]),
    "timm": (
        ["blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"],
        ["patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"],
    ),
    "diffusers": (
        ["attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_k_ip.weight", "attn1.to_out.0.weight"],
        ["ff.net.0.proj.weight"],
    ),
    "keys and values together": (["to_q.weight", "to_kv.weight", "to_out.weight"], []),
    "flash-attn": (["mixer.Wqkv.weight", "mixer.out_proj.weight"], ["mlp.fc1.weight"]),
    "deepseek": (
        [
            "q_a_proj.weight",
            "q_b_proj.weight",
            "kv_a_proj_with_mqa.weight",
            "kv_b_proj.weight",
            "o_proj.weight",
        ],
        ["q_a_layernorm.weight", "kv_a_layernorm.weight"],
    ),
    "reformer": (["attention.query_key.weight", "attention.value.weight"], []),
    "as in papers": (["slf.w_qs.weight", "slf.w_ks.weight", "slf.w_vs.weight"], ["slf.fc.weight"]),
    "words for several": (["keys.weight", "queries.weight"], ["unify_heads.weight"]),
    "camels": (["a.queryProj.weight", "a.keyProj.weight", "a.outProj.weight"], []),
    "of heads": (["a.W_Q", "a.W_K", "a.W_V", "a.W_O"], ["a.b_Q", "a.b_K", "a.b_O"]),
    "normalised": (
        ["attn.q_proj.weight", "attn.k_proj.weight"],
        ["attn.q_norm.weight", "attn.k_norm.weight", "attn.q_proj.bias", "attn.k_proj.bias"],
    ),
    "convolved": (["q_proj.weight", "k_proj.weight"], ["q_conv1d.weight", "k_conv1d.weight"]),
    "wrapped": (
        [
            "a.q_proj._orig_mod.weight",
            "a.k_proj._checkpoint_wrapped_module.weight",
            "a.v_proj.base_layer.weight",
            "b.parametrizations.in_proj_weight.original0",
            "c.qkv.parametrizations.weight.original",
            "d.qkv.weight_orig",
            "d.proj.weight_orig",
        ],
        ["a.q_proj.lora_A.default.weight", "e._orig_mod.weight"],
    ),
    "embeddings": ([], ["query_embedding.weight", "key_embedding.weight"]),
    "half of a network": ([], ["to_qkv_mlp_proj.weight"]),
    "a critic's value": ([], ["value.weight", "policy.weight", "output.weight"]),
    "a key without a query": ([], ["rwkv.key.weight", "rwkv.value.weight", "rwkv.output.weight"]),
    "a query and a key of two modules": ([], ["encoder.query.weight", "memory.key.weight"]),
    "mamba": ([], ["mixer.in_proj.weight", "mixer.x_proj.weight", "mixer.out_proj.weight"]),
    "words that only end so": ([], ["block.weight", "task.weight", "network.weight", "quark"]),
}


@pytest.mark.parametrize("model", FOUND)
def test_projections_are_told_by_their_names(model):
    projections, others = FOUND[model]
    assert attention_projections([*others, *projections]) == set(projections)
    wrapped = [f"_orig_mod.module.{name}" for name in projections]
    assert attention_projections(wrapped) == set(wrapped)


@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 4}])
def test_those_of_torchs_attention(widths):
    attention = torch.nn.MultiheadAttention(8, 2, **widths)
    shapes = {name: param.shape for name, param in attention.named_parameters()}
    found = attention_projections(shapes)
    inputs = 8 + sum(widths.values()) if widths else 24
    assert sum(shapes[name].numel() for name in found) == 8 * (inputs + 8)


def test_there_may_be_no_names():
    assert attention_projections([]) == frozenset()
    assert attention_projections(["", ""]) == frozenset()
