# What a cluster on AWS needs for this project: a bucket, a registry, a GPU node group, and access to the bucket without
# keys. The EKS cluster and its network exist already. State belongs into a bucket: terraform init -backend-config=...
terraform {
  required_version = ">= 1.10"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }

  backend "s3" {
    key          = "valr/terraform.tfstate"
    encrypt      = true
    use_lockfile = true
  }
}

provider "aws" {
  region = var.region

  default_tags {
    tags = {
      project = "valr"
    }
  }
}
