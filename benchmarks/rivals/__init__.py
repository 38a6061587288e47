"""Claim: nobody trains or runs these models faster on the same two cores."""
