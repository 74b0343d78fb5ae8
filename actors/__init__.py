"""Everything that runs somewhere else: the only package that imports ray and vllm. No algorithm lives here."""
