"""Adapt a pre-trained Vision Mamba, ViT or VMamba to your own pictures with Selective Visual Prompting."""
