"""Pure decisions: coefficients, policy, the plan, and the record that an output carries."""
