"""What methods that look at data need: data sets, the base model, statistics of activations, adaptation.

``settings``, ``dataset``, ``statistics_file`` and ``inputs`` read headers and text only and import no torch;
the rest is loaded when a merge runs. Loading a base model needs the extra ``eval`` (transformers).
"""
