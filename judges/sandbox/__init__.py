"""Where code runs that a model wrote: processes that may compute, and little else. See `confine` for what holds."""
