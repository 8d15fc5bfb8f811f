"""Programs that put pipeline and tokenizer together. The only place that knows Ray and OmegaConf."""
