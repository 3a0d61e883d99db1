"""Values of the options --experts and --attention. Imports no gguf, so that help needs no extra."""

EXPERT_CHOICES = ("f32", "f16", "q8_0", "q4_1", "q4_k", "q3_k")
ATTENTION_CHOICES = ("f32", "f16", "q8_0", "q4_1", "q4_k")
