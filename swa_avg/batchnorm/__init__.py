"""BatchNorm statistics, re-estimated with a live model. Importing this imports no Keras."""

from swa_avg.batchnorm.loading import Loading
from swa_avg.batchnorm.refresh import refresh_batchnorm
from swa_avg.batchnorm.report import RefreshReport
from swa_avg.batchnorm.request import Refresh

__all__ = ["Loading", "Refresh", "RefreshReport", "refresh_batchnorm"]
