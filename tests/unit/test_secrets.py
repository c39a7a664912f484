"""Secrets in people's configurations and variables reach no run, no record and no report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Main, main
from logs import LOSSES

from bf16prof.measuring.machine import ALLOWED_ENVIRONMENT, environment
from bf16prof.profiles.secrets import TAKEN_OUT, command_without_secrets, without_secrets

__all__ = ["main"]

MARK = "s3cr3t-canary"
CONFIG = json.loads((Path(__file__).parents[1] / "data" / "hf-gpt2.json").read_text())
SECRETS = {
    "hub_token": MARK, "use_auth_token": MARK, "api_key": MARK, "WANDB_API_KEY": MARK, "slack_webhook": MARK, "webhook_url": MARK,
    "aws_secret_access_key": MARK, "password": MARK, "accessToken": MARK, "push_to": f"https://user:{MARK}@host/path",
    "report_to": f"hf_{MARK}abcdefgh", "nested": {"auth": {"token": MARK}, "tokens": [MARK, MARK]}, "credentials": [MARK],
}  # fmt: skip
HARMLESS = {
    "pad_token_id": 3, "bos_token_id": [1, 2], "num_key_value_heads": 4, "use_auth_token": True, "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new", "hybrid_override_pattern": "M-M-M*-M-", "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "layer_types": ["full_attention"], "attention_type": "block_sparse",
    "mamba_d_head": "auto", "lr": "1e-5", "type": "AdamW", "communication_data_type": "fp32", "device": "cpu", "sliding_window": 2**40,
    "lower_precision_safe_modules": ["torch.nn.Linear"], "attention_types": [[["global", "local"], 12]], "hidden_act": None,
}  # fmt: skip
NOT_DECIDING = {
    "_name_or_path": f"/home/{MARK}/model", "tokenizer_class": MARK, "transformers_version": MARK, "wandb_entity": MARK, "note": MARK,
    "output_path": f"/scratch/{MARK}", "job_name": MARK, "team": MARK, "task_specific_params": {"summary": {"prefix": MARK}},
    "nested": [{"comment": MARK}, [MARK]], "author": {"name": MARK}, "label2id": {MARK: 0},
}  # fmt: skip
TEXTS_OF_TRANSFORMERS = """
_out_features activation activation_function adapter_act afn alpha_initializer alpha_type approx_mode architecture architectures
attention_type attn_impl attn_layers attn_type attractor_kind autocast_kernel_dtype average_approximation_function backbone
bin_centers_type bins_strategy block_types chunkwise_kernel class_distance_type classifier_activation classifier_pooling conv_activation
conv_glu_type conv_norm_activation cross_attention_shape_for_attention csp_activation ctc_loss_reduction decoder decoder_activation
decoder_activation_function decoder_hidden_act decoder_method default_language dense_act_fn depth_decoder_activation
depth_estimation_type distribution_output downsample_mode dtype encoder encoder_activation_function encoder_attention_type
encoder_feedforward_activation encoder_fuse_op encoder_hidden_act encoder_type esm_type expert_selection_fn feat_extract_activation
feat_extract_norm feed_forward_proj ff_activation flow_type fusion_type gating global_padding gnn_layers_types head_aggregation hidden_act
hidden_activation hidden_mamba_act indexer_types inference_state_dtype init_device interpolate_mode languages layer_type layer_types
layers_block_type link_tower_type loss loss_reduction mamba_hidden_act mamba_ssm_cache_dtype mask_downsampler_hidden_act mask_type
memory_attention_feed_forward_hidden_act memory_attention_mlp_hidden_act memory_fuser_hidden_act mlp_activation_function mlp_hidden_act
mlp_layer_types mode mtp_layer_types mtp_layers_block_type mtp_mlp_layer_types nemo_activation norm norm_mlp norm_rel_ebd norm_strategy
norm_type normalization_type output_gate_type pad_mode padding_mode patching_mode pooler_act pooler_hidden_act pooling pooling_type
pos_att_type position_embedding_type position_embeddings_type positional_encoding_type projection_hidden_act projector_hidden_act
prompt_hidden_act qk_norm_type qkv_projection_method readout_activation readout_type recurrent_kv_cache_mode resi_connection router_dtype
scaling scoring_func second_expert_policy segmentation_head_activation_function sequence_kernel shared_expert_combination_strategy
sliding_window_pattern spatial_pool_mode speech_encoder_hidden_act stem_act_func stem_type step_kernel summary_activation summary_type
time_step_init_scheme tokenize_function topk_method upsampler use_bidirectional_attention vision_aspect_ratio
vision_feature_select_strategy visual_prompter_apply visual_prompter_type weight_mode
"""
"""Keys whose default in a configuration class of transformers 5.24 is a text, or a list of texts,
or may be one; without those that name data, languages' prefixes and versions."""


def test_secrets_are_taken_out_and_nothing_that_decides_memory() -> None:
    assert MARK not in json.dumps(without_secrets({**SECRETS, **NOT_DECIDING}))
    assert without_secrets(HARMLESS) == HARMLESS


@pytest.mark.parametrize("key", TEXTS_OF_TRANSFORMERS.split())
def test_what_decides_a_model_of_transformers_stays(key: str) -> None:
    said = {key: "gelu_new", "text_config": {key: ["full_attention", "sliding_attention"]}}
    assert without_secrets(said) == said


def test_a_classifier_keeps_the_number_of_its_classes() -> None:
    labels = {"0": f"loves {MARK}", "1": f"hates {MARK}", "2": "other"}
    assert without_secrets({"id2label": labels, "label2id": {MARK: 0}}) == {"id2label": dict.fromkeys("012", TAKEN_OUT)}


def test_a_command_line_keeps_no_secret() -> None:
    typed = ["bf16prof", "--set", f'deepspeed.more.monitor.api_key="{MARK}"', f"https://me:{MARK}@host", "--seq=3", "--set", "a.b=[1, 2]"]

    assert command_without_secrets(typed) == (
        "bf16prof", "--set", f"deepspeed.more.monitor.api_key={TAKEN_OUT}", TAKEN_OUT, "--seq=3", "--set", "a.b=[1, 2]",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["BF16PROF_API_KEY", "BF16PROF_FOO", "BF16PROF_HUB", "HF_TOKEN", "WANDB_API_KEY", "MY_VARIABLE"])
def test_a_variable_that_is_not_on_the_list_is_not_recorded(name: str) -> None:
    assert environment({name: MARK}) == {}


def test_a_variable_on_the_list_is_recorded_unless_its_value_is_a_secret() -> None:
    assert environment({"BF16PROF_PROFILE": "gpt2-xl"}) == {"BF16PROF_PROFILE": "gpt2-xl"}
    assert environment({"BF16PROF_PROFILE": f"https://user:{MARK}@host"}) == {}
    assert "BF16PROF_PARENT" not in ALLOWED_ENVIRONMENT


def test_no_secret_of_a_configuration_reaches_a_run_or_a_page(main: Main, tmp_path: Path) -> None:
    config, ds_config, log = tmp_path / "config.json", tmp_path / "ds.json", tmp_path / "losses.csv"
    config.write_text(json.dumps({**CONFIG, **NOT_DECIDING, **SECRETS}))
    logger = {"enabled": False, **NOT_DECIDING, **SECRETS}
    ds_config.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "comms_logger": logger}))
    log.write_text(LOSSES)
    selection = ("--hf-config", config, "--ds-config", ds_config, "--gpus", "2")
    outputs = [part for suffix in (".json", ".html", ".md", ".csv") for part in ("-o", tmp_path / f"out{suffix}")]
    code, out, err = main("import", log, *selection, "-d", tmp_path / "run", "--json", "--verbose", *outputs)
    config.unlink()
    ds_config.unlink()

    assert code == 0, err
    assert MARK not in out + err
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or MARK not in path.read_text(), path
