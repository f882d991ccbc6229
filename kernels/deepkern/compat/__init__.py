"""deepkern under the call signatures that people already use, a module per library."""
