"""``fiq doctor``: looks at everything that a deployment rests on, and says what is wrong, what it means, what to do."""
