"""What a profile is: events and their subjects, the registry, the definitions, the typed mirror. Pure; no I/O."""
