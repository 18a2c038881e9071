"""What all services share: settings, logs, lifecycle, management endpoints, tokens, tracing, retries."""
