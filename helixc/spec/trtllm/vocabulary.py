"""The keys of TensorRT-LLM's configuration files, so that a misspelt key can be told from one that means nothing here.

A nested table lists the keys of a mapping; ANY marks a value whose inside is not looked at. The tables hold what the
published files use and what TensorRT-LLM's documentation of LlmArgs and of disaggregated serving names.
"""

from __future__ import annotations

from collections.abc import Mapping

ANY: Mapping[str, Keys] = {}
Keys = Mapping[str, "Keys"]


def _any(*names: str) -> dict[str, Keys]:
    return dict.fromkeys(names, ANY)


KV_CACHE: Keys = _any(
    *("tokens_per_block", "dtype", "max_tokens", "free_gpu_memory_fraction", "enable_block_reuse"),
    *("enable_partial_reuse", "copy_on_partial_reuse", "block_reuse_config", "max_attention_window"),
    *("sink_token_length", "host_cache_size", "disk_cache_size", "disk_cache_path", "onboard_blocks"),
    *("cross_kv_cache_fraction", "secondary_offload_min_priority", "event_buffer_max_size"),
    *("attention_dp_events_gather_period_ms", "kv_events_config", "kv_cache_event_hash_algo", "use_uvm"),
    *("max_gpu_total_bytes", "iteration_stats_interval", "mamba_ssm_cache_dtype", "mamba_ssm_stochastic_rounding"),
    *("mamba_ssm_philox_rounds", "mamba_state_cache_interval", "mamba_state_config", "use_kv_cache_manager_v2"),
    *("enable_swa_scratch_reuse", "max_util_for_resume", "enable_kv_pool_rebalance", "pool_ratio"),
    *("kv_pool_rebalance_min_sampled_kv_caches", "kv_pool_rebalance_cooldown_secs"),
    *("kv_pool_rebalance_target_ratio_update_interval", "kv_pool_rebalance_ratio_threshold"),
)
CP_CONFIG: Keys = _any(
    "cp_type", "tokens_per_block", "use_nccl_for_alltoall", "fifo_version", "cp_anchor_size", "block_size"
)
TRANSCEIVER: Keys = _any(
    *("backend", "transceiver_runtime", "max_tokens_in_buffer", "kv_transfer_timeout_ms"),
    *("kv_transfer_sender_future_timeout_ms", "kv_transfer_poll_interval_ms", "kv_cache_bounce_size_mb"),
    *("enable_pipelined_transfer", "enable_cache_transceiver", "max_num_tokens"),
)
CUDA_GRAPH: Keys = _any("batch_sizes", "max_batch_size", "enable_padding", "padding_enabled", "num_tokens", "seq_lens")
MOE: Keys = _any(
    *("backend", "max_num_tokens", "load_balancer", "disable_finalize_fusion", "use_low_precision_moe_combine"),
    *("use_cuda_graph", "use_fp8_combine"),
)
SPECULATIVE: Keys = _any(
    *("decoding_type", "max_draft_len", "max_total_draft_tokens", "speculative_model", "speculative_model_dir"),
    *("eagle3_one_model", "eagle_choices", "eagle3_layers_to_capture", "eagle3_model_arch", "num_eagle_layers"),
    *("use_dynamic_tree", "dynamic_tree_max_topK", "max_non_leaves_per_layer", "greedy_sampling"),
    *("posterior_threshold", "num_nextn_predict_layers", "use_relaxed_acceptance_for_thinking", "relaxed_topk"),
    *("relaxed_delta", "use_mtp_vanilla", "mtp_eagle_one_model", "begin_thinking_phase_token"),
    *("end_thinking_phase_token", "sa_config", "load_format", "max_concurrency", "draft_len_schedule"),
    *("acceptance_window", "acceptance_length_threshold", "allow_advanced_sampling", "max_matching_ngram_size"),
    *("is_keep_all", "is_use_oldest", "is_public_pool", "enable_global_pool", "global_pool_size", "mask_token_id"),
    *("target_layer_ids", "attention_backend", "block_size", "markov_rank", "markov_head_type", "max_window_size"),
    *("max_ngram_size", "max_verification_set_size", "medusa_choices", "num_medusa_heads", "output_directory"),
    *("write_interval", "file_prefix", "drafter", "resource_manager", "use_rejection_sampling"),
)
ATTENTION_DP: Keys = _any("enable_balance", "batching_wait_iters", "timeout_iters", "kv_cache_routing")

# One worker's options: LlmArgs, in the files that --extra_llm_api_options takes and in every section of servers.
WORKER: Keys = {
    **_any(
        *("model", "backend", "dtype", "revision", "load_format", "tokenizer", "tokenizer_mode", "tokenizer_revision"),
        *("custom_tokenizer", "skip_tokenizer_init", "trust_remote_code", "model_kwargs", "post_processor_hook"),
        *("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "gpus_per_node"),
        *("moe_tensor_parallel_size", "moe_expert_parallel_size", "moe_cluster_parallel_size", "pp_partition"),
        *("enable_attention_dp", "enable_lm_head_tp_in_adp", "max_batch_size", "max_num_tokens", "max_seq_len"),
        *("max_input_len", "max_beam_width", "enable_chunked_prefill", "free_gpu_memory_fraction"),
        *("kv_cache_free_gpu_memory_fraction", "guided_decoding_backend", "gather_generation_logits", "env_overrides"),
        *("enable_lora", "lora_config", "peft_cache_config", "scheduler_config", "sparse_attention_config"),
        *("kv_cache_compression_config", "iter_stats_max_iterations", "request_stats_max_iterations"),
        *("num_postprocess_workers", "postprocess_tokenizer_dir", "num_serve_frontends", "reasoning_parser"),
        *("tool_parser", "decoding_config", "otlp_traces_endpoint", "return_perf_metrics", "perf_metrics_output_dir"),
        *("perf_metrics_max_requests", "prometheus_metrics_config", "enable_energy_metrics", "orchestrator_type"),
        *("telemetry_config", "batched_logits_processor", "garbage_collection_gen0_threshold", "nvfp4_gemm_config"),
        *("disable_overlap_scheduler", "attn_backend", "sampler_type", "sampler_force_async_worker"),
        *("enable_in_graph_sampling", "enable_speculative_beam_history_d2h", "enable_early_first_token_response"),
        *("enable_low_latency_host_dispatch", "enable_iter_perf_stats", "enable_iter_req_stats", "print_iter_log"),
        *("batch_wait_timeout_ms", "batch_wait_timeout_iters", "batch_wait_max_tokens_ratio", "torch_compile_config"),
        *("prefill_cuda_graph_backend", "prefill_capture_num_tokens", "enable_autotuner", "use_fine_grained_sync"),
        *("enable_layerwise_nvtx_marker", "enable_min_latency", "stream_interval", "force_dynamic_quantization"),
        *("allreduce_strategy", "checkpoint_loader", "checkpoint_format", "checkpoint_io_policy", "mx_config"),
        *("gms_config", "kv_connector_config", "mm_encoder_only", "disable_mm_encoder", "encode_only", "dwdp_config"),
        *("ray_worker_extension_cls", "ray_placement_config", "ray_worker_nsight_options", "sleep_config"),
        *("reorder_policy_config", "enable_resource_governor", "use_cute_dsl_blockscaling_mm", "max_stats_len"),
        *("use_cute_dsl_blockscaling_bmm", "use_cute_dsl_bf16_bmm", "use_cute_dsl_bf16_gemm", "quant_config"),
        *("layer_wise_benchmarks_config", "encoder_cuda_graph_config", "multimodal_config", "encoder_max_batch_size"),
        *("encoder_max_num_tokens", "enable_mla_skip_correction", "mla_skip_correction_threshold"),
        *("pytorch_backend_config", "build_config", "calib_config", "enable_build_cache", "fast_build", "workspace"),
        *("extended_runtime_perf_knob_config", "batching_type", "normalize_log_probs", "embedding_parallel_mode"),
        *("moe_backend", "moe_load_balancer", "moe_max_num_tokens", "use_cuda_graph", "cuda_graph_padding_enabled"),
        *("cuda_graph_batch_sizes", "cuda_graph_max_batch_size", "use_kv_cache", "enable_trtllm_sampler"),
        *("mixed_sampler", "kv_cache_dtype", "auto_parallel", "use_torch_sampler", "log_level"),
    ),
    "kv_cache_config": KV_CACHE,
    "cp_config": CP_CONFIG,
    "cache_transceiver_config": TRANSCEIVER,
    "cuda_graph_config": CUDA_GRAPH,
    "moe_config": MOE,
    "speculative_config": SPECULATIVE,
    "attention_dp_config": ATTENTION_DP,
}
SERVERS: Keys = {**WORKER, **_any("num_instances", "urls", "router")}

# What the orchestrator takes for itself; every other top-level key goes to both sections of servers.
ORCHESTRATOR_OWN: Keys = _any(
    *("hostname", "port", "max_retries", "perf_metrics_max_requests", "return_perf_metrics"),
    *("perf_metrics_output_dir", "conditional_disagg_config", "otlp_config", "disagg_cluster", "node_id"),
    *("schedule_style", "allow_request_chat_template", "gen_strip_message_history", "gen_tokids_ctxbytes"),
    *("num_workers", "disagg_coordinator_url", "metadata_server", "server_start_timeout", "request_timeout"),
)
ORCHESTRATOR: Keys = {
    **WORKER,
    **ORCHESTRATOR_OWN,
    "context_servers": SERVERS,
    "generation_servers": SERVERS,
    # Older files put the routers beside the servers.
    **_any("ctx_router", "gen_router"),
}
BENCHMARK: Keys = {
    **_any("metadata", "slurm", "environment", "profiling", "accuracy", "server_config", "telemetry", "sequence"),
    "server": ANY,  # of a job that serves both phases from one instance
    "benchmark": ANY,
    "hardware": _any("gpus_per_node", "num_ctx_servers", "num_gen_servers", "gpu_type"),
    "worker_config": {
        "gen": WORKER,
        "ctx": WORKER,
        **_any("concurrency_list", "eplb_num_slots", "mtp_size", "cache_transceiver_max_num_tokens"),
    },
}

# Names that no longer work in current releases, and what replaced them.
RENAMED: Mapping[str, str] = {
    "pytorch_backend_config": "its keys stand at the top level now",
    "build_config": "max_batch_size, max_num_tokens and max_seq_len stand in the section itself now",
    "moe_backend": "write `moe_config: {backend: ...}`",
    "moe_load_balancer": "write `moe_config: {load_balancer: ...}`",
    "moe_max_num_tokens": "write `moe_config: {max_num_tokens: ...}`",
    "use_cuda_graph": "write `cuda_graph_config: {...}`, or `cuda_graph_config: null` for none",
    "cuda_graph_padding_enabled": "write `cuda_graph_config: {enable_padding: ...}`",
    "cuda_graph_batch_sizes": "write `cuda_graph_config: {batch_sizes: ...}`",
    "cuda_graph_max_batch_size": "write `cuda_graph_config: {max_batch_size: ...}`",
    "padding_enabled": "write `enable_padding`",
    "enable_cache_transceiver": "write `backend: DEFAULT`",
    "num_nextn_predict_layers": "write `max_draft_len`",
    "speculative_model_dir": "write `speculative_model`",
    "kv_cache_dtype": "write `kv_cache_config: {dtype: ...}`",
    "enable_trtllm_sampler": "write `sampler_type: TRTLLMSampler`",
    "ctx_router": "write `router` in context_servers",
    "gen_router": "write `router` in generation_servers",
}
