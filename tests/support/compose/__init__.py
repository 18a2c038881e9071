"""The product's containers, as compose starts them."""
