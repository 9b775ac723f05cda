"""Detection and mitigation among parties that show each other nothing: three-party computation on the fleet's evidence.

Who sees what, and what is not protected, stands in docs/private.md.
"""
