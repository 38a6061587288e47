"""Claim: peak memory per device is predicted, stays under the limit, and a model too large for one device trains."""
