from support.caches import private_caches

__all__ = ["private_caches"]
