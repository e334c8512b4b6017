"""The service as a Hugging Face Hub: unmodified Hub clients read models and results below ``/hf``."""
