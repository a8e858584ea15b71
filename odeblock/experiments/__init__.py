"""The experiments behind ``python -m odeblock``; they need the extra ``odeblock[experiments]``."""
