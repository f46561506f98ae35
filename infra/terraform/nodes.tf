# GPU nodes: none while nothing runs, tainted so that only what asks for a GPU lands there.
data "aws_iam_policy_document" "node_trust" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "gpu_node" {
  name               = "valr-gpu-node"
  assume_role_policy = data.aws_iam_policy_document.node_trust.json
}

resource "aws_iam_role_policy_attachment" "gpu_node" {
  for_each = toset(["AmazonEKSWorkerNodePolicy", "AmazonEKS_CNI_Policy", "AmazonEC2ContainerRegistryPullOnly"])

  role       = aws_iam_role.gpu_node.name
  policy_arn = "arn:aws:iam::aws:policy/${each.value}"
}

resource "aws_launch_template" "gpu" {
  name_prefix = "valr-gpu-"

  # Pods don't reach the machine's own rights.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  block_device_mappings {
    device_name = "/dev/xvda"

    ebs {
      volume_type           = "gp3"
      volume_size           = 200
      encrypted             = true
      delete_on_termination = true
    }
  }

  # The local NVMe disks as one, on which pods keep their emptyDir: inputs, checkpoints, the artifact being made. EKS
  # merges its own part into it, so it has to be a MIME archive.
  user_data = base64encode(<<-EOT
    MIME-Version: 1.0
    Content-Type: multipart/mixed; boundary="//"

    --//
    Content-Type: application/node.eks.aws

    apiVersion: node.eks.aws/v1alpha1
    kind: NodeConfig
    spec:
      instance:
        localStorage:
          strategy: RAID0

    --//--
  EOT
  )
}

resource "aws_eks_node_group" "gpu" {
  cluster_name           = var.cluster_name
  node_group_name_prefix = "valr-gpu-"
  node_role_arn          = aws_iam_role.gpu_node.arn
  subnet_ids             = var.subnet_ids
  ami_type               = "AL2023_x86_64_NVIDIA"
  capacity_type          = var.spot ? "SPOT" : "ON_DEMAND"
  instance_types         = [var.gpu_instance_type]

  launch_template {
    id      = aws_launch_template.gpu.id
    version = aws_launch_template.gpu.latest_version
  }

  scaling_config {
    min_size     = 0
    desired_size = 0
    max_size     = var.max_gpu_nodes
  }

  update_config {
    max_unavailable = 1
  }

  taint {
    key    = "nvidia.com/gpu"
    value  = "present"
    effect = "NO_SCHEDULE"
  }

  labels = {
    "valr/gpu" = "true"
  }

  lifecycle {
    create_before_destroy = true
    # The autoscaler's to change.
    ignore_changes = [scaling_config[0].desired_size]
  }

  depends_on = [aws_iam_role_policy_attachment.gpu_node]
}

data "aws_ec2_instance_type" "gpu" {
  instance_type = var.gpu_instance_type
}

locals {
  # GB: the local disks, or the root volume where the type has none.
  gpu_node_disk = (
    data.aws_ec2_instance_type.gpu.instance_storage_supported
    ? data.aws_ec2_instance_type.gpu.total_instance_storage
    : aws_launch_template.gpu.block_device_mappings[0].ebs[0].volume_size
  )
}

# What cluster-autoscaler has to know of a node while there is none to look at. Of the type it knows cores, memory and
# GPUs; every Job asks for disk as well, and no node would ever be added for one. Without the taint it adds one for any
# pod. The tags stand on the scaling group, where every version reads them: newer ones look at the node group too, if they
# may call eks:DescribeNodegroup. EKS itself sets the tags by which the group is found.
resource "aws_autoscaling_group_tag" "gpu" {
  for_each = {
    # The kubelet keeps a tenth free, and some for itself.
    "resources/ephemeral-storage" = "${floor(0.85 * local.gpu_node_disk)}G"
    "taint/nvidia.com/gpu"        = "present:NoSchedule"
  }

  autoscaling_group_name = aws_eks_node_group.gpu.resources[0].autoscaling_groups[0].name

  tag {
    key                 = "k8s.io/cluster-autoscaler/node-template/${each.key}"
    value               = each.value
    propagate_at_launch = false
  }
}
