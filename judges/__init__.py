"""Judges and the runtime around them. Knows the core's types; never ray, never vllm."""
