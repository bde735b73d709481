"""Shadow scoring: computes, after a decision was answered, how the policy that did not serve would have ranked it."""
