"""Mixture of experts: routing tokens to experts, and their way there and back."""
