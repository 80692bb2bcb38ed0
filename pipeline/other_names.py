"""Names that other trainers have for our settings: answers to `--lr`, `--max_steps`, `--batch_size`, `--resume` and the like.

Nothing here sets anything. An unknown option or setting is refused all the same, with the setting that does it.
"""

_SETTINGS: dict[str, str] = {
    # The optimizer and its schedule.
    "training.learning_rate": "lr max_lr peak_lr base_lr",
    "training.final_learning_rate_fraction": "min_lr_ratio min_lr_rate",
    "training.warmup_steps": "warmup warmup_iters lr_warmup_steps num_warmup_steps lr_warmup_iters",
    "training.schedule": "lr_scheduler lr_scheduler_type lr_decay_style scheduler",
    "training.steps": "max_steps num_steps train_steps total_steps max_iters train_iters num_iterations iterations",
    "training.tokens": "max_tokens num_tokens train_tokens total_tokens token_budget",
    "training.epochs": "num_epochs num_train_epochs train_epochs epoch max_epochs",
    "training.weight_decay": "wd",
    "training.beta1": "adam_beta1",
    "training.beta2": "adam_beta2",
    "training.adam_eps": "eps epsilon adam_epsilon",
    "training.gradient_clipping": "clip_grad grad_clip max_grad_norm gradient_clip_val clip",
    # The batch.
    "data.global_batch": "batch_size global_batch_size train_batch_size total_batch_size bs batch",
    "data.micro_batch": "micro_batch_size per_device_train_batch_size device_batch_size train_micro_batch_size_per_gpu",
    "data.sequence_length": "seq_length seq_len max_seq_length max_seq_len block_size context_length max_length",
    # Data.
    "data.path": "data dataset dataset_name data_dir train_data train_file data_path",
    "data.validation_path": "val_data valid_data eval_data validation_file val_path validation_data eval_dataset",
    "data.num_workers": "workers dataloader_num_workers",
    # The model.
    "model.pretrained": "model model_name model_name_or_path init_from pretrained_model base_model",
    "model.size": "model_size",
    "model.dim": "hidden_size n_embd d_model embed_dim hidden_dim",
    "model.num_layers": "n_layer n_layers num_hidden_layers layers depth",
    "model.num_attention_heads": "n_head n_heads num_heads",
    "model.num_key_value_heads": "n_kv_heads num_query_groups num_kv_heads",
    "model.ffn_dim": "intermediate_size ffn_hidden_size",
    "model.num_prediction_heads": "n_future n_future_tokens mtp_heads mtp_num_layers num_mtp_heads",
    "model.tied_embeddings": "tie_word_embeddings tie_embeddings",
    # Reference and selection.
    "reference.path": "reference ref_model reference_model ref reference_model_path",
    "training.k_percent": "k top_k topk ratio select_ratio selection_ratio token_ratio",
    "training.detach_heads": "mtp_detach_heads detach_mtp mtp_decoder_input_detach",
    "training.head_weights": "mtp_loss_weight mtp_loss_scaling_factor mtp_lambda",
    # Checkpoints and records.
    "checkpoint.every": "save_steps save_interval save_every checkpoint_interval ckpt_interval",
    "checkpoint.keep": "save_total_limit keep_last keep_checkpoints",
    "logging.metrics_every": "logging_steps log_interval log_every",
    "logging.validation_every": "eval_steps eval_interval eval_every val_interval validation_interval",
    "training.activation_checkpointing": "gradient_checkpointing recompute_activations",
    "training.deterministic": "use_deterministic_algorithms full_determinism cudnn_deterministic",
    "logging.profile_steps": "profile profiler profile_step_start",
    "run.name": "run_name experiment_name exp_name job_name",
}

_CONTINUES = "a run continues by itself when it is started again with the same --run-dir"
_PRECISION = "precision is the DeepSpeed JSON's (bf16; float32 on a CPU)"
_ACCUMULATION = "the accumulation steps follow: data.global_batch / (ranks × data.micro_batch)"
_LAUNCHER = "the launcher sets the number of ranks: deepspeed --num_gpus N, or sbatch's options"
_FLOOR = "the learning rate ends at training.final_learning_rate_fraction, a fraction of training.learning_rate"
_ADVICE: dict[str, str] = {
    _FLOOR: "min_lr final_lr lr_end",
    "the warm-up is counted in steps: training.warmup_steps": "warmup_ratio warmup_fraction lr_warmup_fraction",
    _CONTINUES: "resume resume_from resume_from_checkpoint load load_checkpoint ckpt checkpoint_path restart",
    "the folder of a run is --run-dir DIR": "output_dir out_dir save_dir output out save checkpoint_dir logging_dir",
    _ACCUMULATION: "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches gas",
    _PRECISION: "bf16 fp16 fp32 precision dtype mixed_precision amp",
    _LAUNCHER: "num_gpus gpus n_gpus nproc nproc_per_node nnodes num_nodes world_size",
    "the tokenizer is given to launch/prepare.py; training takes the prepared data's": (
        "tokenizer tokenizer_path tokenizer_name"
    ),
    "a recipe is named by --config FILE": "recipe yaml yml config_file cfg",
    "metrics are in RUN/metrics.jsonl and RUN/tensorboard": "report_to tensorboard",
    "each thing that is random has a seed of its own: data.seed, model.seed, training.selection_seed": "random_seed",
    "the optimizer is AdamW, with training.weight_decay, beta1, beta2 and adam_eps (README says why not Muon)": (
        "optimizer optim optimizer_name muon"
    ),
}

SETTING_OF = {name: setting for setting, names in _SETTINGS.items() for name in names.split()}
"""Our setting, `section.key`, by what others call it."""

ADVICE_ON = {name: advice for advice, names in _ADVICE.items() for name in names.split()}
"""A sentence by the name of something that is no setting of ours, or more than one."""
