"""How the secrets look that nothing may write down."""

# What no log and no row may hold: a key or a token of ours, a webhook's secret, the signature of an
# address, a person's token. Written for Python and PostgreSQL alike.
SECRET = (
    r"fs[a-z]_[0-9a-f]{16}_[0-9a-f]{64}_[0-9a-f]{8}|whsec_[A-Za-z0-9+/]{43}="
    r"|X-Amz-Signature=[0-9a-f]{64}|eyJ[A-Za-z0-9_-]{8,}[.]eyJ[A-Za-z0-9_-]{8,}[.][A-Za-z0-9_-]{16,}"
)
