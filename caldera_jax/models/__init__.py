"""Language models as pytrees: the Llama family, its files, its tokenizers and the built-in model and text."""
