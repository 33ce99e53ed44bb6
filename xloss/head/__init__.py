"""Hidden states x lm_head -> token statistics, and back. The only code that ever sees logits."""
