"""The transformer, its shapes and its rotary embedding."""
