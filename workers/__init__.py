"""Celery workers: verify, aggregate, publish, sweep, seal."""
